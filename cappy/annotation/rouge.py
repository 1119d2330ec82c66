"""Rouge-L, equal to `rouge_score` to the last bit, for one response or, much faster, for whole columns.

`rouge_score` 0.1.2 is the reference that the tests compare with. For columns, distinct texts are tokenised together as
bytes, distinct words are stemmed once, and each text becomes a string with one character per token, for which rapidfuzz
computes the longest common subsequence fastest (bit-parallel, linear memory). Instances are processed in chunks, so
memory does not grow with rows.

The published Rouge-L sees only [a-z0-9], so other text scores 0; `rouge_l_unicode` is Rouge-L for every script.
"""

import re
import unicodedata
from collections.abc import Hashable, Iterator, Sequence
from functools import cache, lru_cache
from itertools import chain, pairwise
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import regex
from rapidfuzz.distance import LCSseq
from rapidfuzz.process import cpdist

if TYPE_CHECKING:
    from nltk.stem.porter import PorterStemmer

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
_Tokens = str | tuple[int, ...]
"""A text with one character, or one number, per token."""

COLUMNS = ("references", "candidates.list.element.response")
"""The columns that `rouge_l_batch` reads, for `cappy.records.read_batches`."""
CHUNK_CHARACTERS = 2**21
CHUNK_PAIRS = 2**17
"""Limits of a chunk, which keep temporary arrays to tens of MB."""
_CHARACTERS = 0x110000 - 0x800
"""Number of characters that can represent tokens, without surrogates."""
_IS_WORD = np.zeros(256, dtype=np.bool_)
_IS_WORD[[*b"abcdefghijklmnopqrstuvwxyz0123456789"]] = True

_WORDS = re.compile(r"[a-z0-9]+")
_INVISIBLE = re.compile(r"[^\W_a-z0-9]|[\u0300-\u036f]")
_MAX_CACHED_CHARACTERS = 4_096
"""Longer texts are not cached, which bounds the size of the cache."""
_MAX_CACHED_WORD = 64
_NO_SUFFIX_ENDS = frozenset("0123456789abfhjkopquvwxz")
"""Last characters that no suffix in Porter's rules has: such a word is its own stem."""
# Scripts without spaces between words, where a token is one character with its marks.
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}"
_UNICODE_TOKEN = regex.compile(
    rf"(?V1)[[{_UNSPACED}]&&\p{{L}}]\p{{M}}*|[[\p{{L}}\p{{N}}\p{{M}}]--[[{_UNSPACED}]&&\p{{L}}]]+"
)


def rouge_l(references: Sequence[str], response: str, *, use_stemmer: bool = True) -> float:
    """Rouge-L F1 of a response, 0 to 1: the maximum over the references (Lin 2004; Cappy, §4).

    Tokens are lower-case runs of [a-z0-9]; those longer than three characters are Porter-stemmed. Texts without tokens,
    such as non-Latin texts, score 0.
    """
    tokens = _tokenize(response, use_stemmer)
    return max((_f_measure(_tokenize(reference, use_stemmer), tokens) for reference in references), default=0.0)


def _tokenize(text: str, use_stemmer: bool = True) -> tuple[str, ...]:
    """The tokens of a text, stemmed by default."""
    return (
        _cached_tokens(text, use_stemmer) if len(text) <= _MAX_CACHED_CHARACTERS else _split_tokens(text, use_stemmer)
    )


def is_visible(text: str) -> bool:
    """Whether a text has any token for Rouge-L."""
    return _WORDS.search(text.lower()) is not None


def is_partly_visible(text: str) -> bool:
    """Whether Rouge-L sees some but not all letters and digits of a text: 2008年, naïve, 5 m²."""
    if text.isascii():
        return False
    lowered = text.lower()
    return _WORDS.search(lowered) is not None and _INVISIBLE.search(lowered) is not None


def _f_measure(target: Sequence[Hashable], prediction: Sequence[Hashable]) -> float:
    """F1 of the longest common subsequence of two token sequences, 0 to 1, in the reference's order of operations."""
    if not target or not prediction:
        return 0.0
    common = LCSseq.similarity(target, prediction)
    precision = common / len(prediction)
    recall = common / len(target)
    return 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0


def _stem(word: str) -> str:
    """The token of a word: its Porter stem if it is longer than three characters."""
    if len(word) <= 3 or word[-1] in _NO_SUFFIX_ENDS:
        return word
    return _porter_stem(word) if len(word) <= _MAX_CACHED_WORD else _stemmer().stem(word)


@cache
def _stemmer() -> "PorterStemmer":
    """Imported at its first use: nltk imports pandas and scikit-learn, which most processes do not need."""
    from nltk.stem.porter import PorterStemmer

    return PorterStemmer()


def _split_tokens(text: str, use_stemmer: bool) -> tuple[str, ...]:
    words = _WORDS.findall(text.lower())
    return tuple(map(_stem, words)) if use_stemmer else tuple(words)


_cached_tokens = lru_cache(maxsize=8_192)(_split_tokens)


@lru_cache(maxsize=131_072)
def _porter_stem(word: str) -> str:
    return str(_stemmer().stem(word))


def rouge_l_unicode(references: Sequence[str], response: str) -> float:
    """Rouge-L F1 of a response, 0 to 1, the maximum over the references, for words of any script.

    Words are normalised in case and width (NFKC), keep their marks and are not stemmed. In scripts without spaces,
    every character with its marks is a word.
    """
    tokens = _unicode_tokens(response)
    return max((_f_measure(_unicode_tokens(reference), tokens) for reference in references), default=0.0)


@lru_cache(maxsize=65_536)
def _unicode_tokens(text: str) -> tuple[str, ...]:
    return tuple(_UNICODE_TOKEN.findall(unicodedata.normalize("NFKC", text).casefold()))


def rouge_l_columns(references: pa.ListArray, responses: pa.ListArray, *, use_stemmer: bool = True) -> pa.ListArray:
    """Rouge-L F1 of every response, 0 to 1, the maximum over its instance's references.

    `references` and `responses` are list<string> columns, one row per instance; the result is list<double> with the
    shape of `responses`. A null list counts as empty, a null text as blank.
    """
    counts = [
        np.asarray(pc.list_value_length(column).fill_null(0), dtype=np.int64) for column in (references, responses)
    ]
    texts = pa.concat_arrays([references.flatten(), responses.flatten()]).fill_null("").dictionary_encode()
    index = np.asarray(texts.indices, dtype=np.int64)
    values = _best_f_measures(texts.dictionary.to_pylist(), index, counts[0], counts[1], use_stemmer)
    return pa.ListArray.from_arrays(pa.array(_offsets(counts[1]), pa.int32()), pa.array(values))


def rouge_l_batch(batch: pa.RecordBatch, *, use_stemmer: bool = True) -> pa.ListArray:
    """Rouge-L F1 of every candidate of a record batch, 0 to 1: list<double> with the shape of `candidates`.

    The batch needs only the columns `COLUMNS`.
    """
    candidates = batch["candidates"]
    counts = np.asarray(pc.list_value_length(candidates).fill_null(0), dtype=np.int64)
    responses = candidates.flatten().field("response")
    column = pa.ListArray.from_arrays(pa.array(_offsets(counts), pa.int32()), responses)
    return rouge_l_columns(batch["references"], column, use_stemmer=use_stemmer)


def rouge_l_pools(
    references: Sequence[Sequence[str]], responses: Sequence[Sequence[str]], *, use_stemmer: bool = True
) -> Floats:
    """Rouge-L F1 of the responses of all instances, concatenated, 0 to 1: the maximum over the references."""
    text_ids: dict[str, int] = {}
    flat = chain.from_iterable((*references, *responses))
    index = np.fromiter((text_ids.setdefault(text, len(text_ids)) for text in flat), dtype=np.int64)
    counts = [np.fromiter(map(len, pools), dtype=np.int64, count=len(pools)) for pools in (references, responses)]
    return _best_f_measures(list(text_ids), index, counts[0], counts[1], use_stemmer)


def token_strings(texts: Sequence[str], *, use_stemmer: bool = True) -> tuple[list[_Tokens], Ints]:
    """Encodes each text with one character per token, consistently within this call, and counts its tokens."""
    ids, bounds = _token_ids(texts, use_stemmer)
    ends = bounds.tolist()
    if len(ids) and ids.max() >= _CHARACTERS:
        return [tuple(ids[start:end].tolist()) for start, end in pairwise(ends)], np.diff(bounds)
    points = np.where(ids >= 0xD800, ids + 0x800, ids).astype("<u4")
    characters = points.tobytes().decode("utf-32-le")
    return [characters[start:end] for start, end in pairwise(ends)], np.diff(bounds)


def _best_f_measures(
    texts: Sequence[str], index: Ints, num_references: Ints, num_responses: Ints, use_stemmer: bool
) -> Floats:
    """The best F1 of each response; `index` has the position in `texts` of every reference, then of every response."""
    first_reference, first_response = _offsets(num_references), _offsets(num_responses)
    targets, predictions = index[: first_reference[-1]], index[first_reference[-1] :]
    sizes = np.fromiter(map(len, texts), dtype=np.int64, count=len(texts))
    characters = _sums(sizes[targets], first_reference) + _sums(sizes[predictions], first_response)
    best = np.zeros(len(predictions))
    for start, stop in _chunks(characters, num_references * num_responses):
        chunk = slice(first_response[start], first_response[stop])
        best[chunk] = _score_chunk(
            texts,
            targets[first_reference[start] : first_reference[stop]],
            predictions[chunk],
            num_references[start:stop],
            num_responses[start:stop],
            use_stemmer,
        )
    return best


def _score_chunk(
    texts: Sequence[str],
    targets: Ints,
    predictions: Ints,
    num_references: Ints,
    num_responses: Ints,
    use_stemmer: bool,
) -> Floats:
    """The best F1 of each response of a chunk of instances."""
    text_ids, index = np.unique(np.concatenate([targets, predictions]), return_inverse=True)
    strings, lengths = token_strings([texts[number] for number in text_ids.tolist()], use_stemmer=use_stemmer)
    targets, predictions = index[: len(targets)], index[len(targets) :]
    num_pairs = np.repeat(num_references, num_responses)
    first_pair = _offsets(num_pairs)
    first_target = np.repeat(_offsets(num_references)[:-1], num_responses)
    best = np.zeros(len(predictions))
    for start, stop in _chunks(num_pairs, num_pairs):
        prediction = np.repeat(predictions[start:stop], num_pairs[start:stop])
        position = np.arange(first_pair[start], first_pair[stop]) - np.repeat(
            first_pair[start:stop], num_pairs[start:stop]
        )
        target = targets[np.repeat(first_target[start:stop], num_pairs[start:stop]) + position]
        values = _pairwise_f_measures(strings, lengths, target, prediction)
        has_pairs = num_pairs[start:stop] > 0
        best[start:stop][has_pairs] = np.maximum.reduceat(
            values, (first_pair[start:stop] - first_pair[start])[has_pairs]
        )
    return best


def _pairwise_f_measures(strings: Sequence[_Tokens], lengths: Ints, targets: Ints, predictions: Ints) -> Floats:
    if not len(targets):
        return np.zeros(0)
    queries, choices = ([strings[number] for number in side.tolist()] for side in (targets, predictions))
    common = cpdist(queries, choices, scorer=LCSseq.similarity, dtype=np.uint32)
    with np.errstate(invalid="ignore", divide="ignore"):
        precision, recall = common / lengths[predictions], common / lengths[targets]
        f_measure = 2 * precision * recall / (precision + recall)
    return np.where(common > 0, f_measure, 0.0)


def _token_ids(texts: Sequence[str], use_stemmer: bool) -> tuple[npt.NDArray[np.int32], Ints]:
    """Ids of the tokens of all texts, concatenated, and the offsets of the texts."""
    lowered = [text.lower() for text in texts]
    # One byte per character keeps lengths; non-ASCII characters become '?', which separates words.
    joined = np.frombuffer("\n".join([*lowered, ""]).encode("ascii", "replace"), dtype=np.uint8)
    is_word = _IS_WORD[joined]
    starts = np.flatnonzero(is_word & ~np.append(False, is_word[:-1]))
    letters = joined[is_word]
    offsets = np.append(np.cumsum(is_word)[starts] - 1, len(letters)).astype(np.int32)
    words = pa.StringArray.from_buffers(len(starts), pa.py_buffer(offsets), pa.py_buffer(letters)).dictionary_encode()
    ids = np.asarray(words.indices)
    if use_stemmer:
        stems = pa.array(map(_stem, words.dictionary.to_pylist()), pa.string()).dictionary_encode()
        ids = np.asarray(stems.indices)[ids]
    ends = np.cumsum(np.fromiter((len(text) + 1 for text in lowered), dtype=np.int64, count=len(lowered)))
    return ids, np.append(0, np.searchsorted(starts, ends))


def _chunks(characters: Ints, pairs: Ints) -> Iterator[tuple[int, int]]:
    """Yields ranges of rows (start, stop) within the limits of a chunk, or of a single row."""
    start, num_characters, num_pairs = 0, 0, 0
    for row, (size, count) in enumerate(zip(characters.tolist(), pairs.tolist(), strict=True)):
        if row > start and (num_characters + size > CHUNK_CHARACTERS or num_pairs + count > CHUNK_PAIRS):
            yield start, row
            start, num_characters, num_pairs = row, 0, 0
        num_characters, num_pairs = num_characters + size, num_pairs + count
    if start < len(characters):
        yield start, len(characters)


def _offsets(counts: Ints) -> Ints:
    return np.append(0, np.cumsum(counts))


def _sums(values: Ints, offsets: Ints) -> Ints:
    """The sum of the values between each two offsets."""
    totals = _offsets(values)
    sums: Ints = totals[offsets[1:]] - totals[offsets[:-1]]
    return sums
