"""Rouge-L, equal to `rouge_score` to the last bit: of one response, and of whole columns many times faster.

`rouge_score` 0.1.2 is the reference that the tests compare with. For columns, distinct texts are tokenised together,
over their bytes; distinct words are stemmed once; each text becomes a string with one character per token, because the
longest common subsequence of strings is what rapidfuzz computes fastest (bit-parallel: linear memory, 64 cells a step).
Work goes by chunks of instances, so memory does not grow with rows.

The published Rouge-L sees [a-z0-9] alone and gives all other text 0; `rouge_l_unicode` is Rouge-L for every script.
"""

import re
import unicodedata
from collections.abc import Hashable, Iterator, Sequence
from functools import lru_cache
from itertools import chain, pairwise

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import regex
from nltk.stem.porter import PorterStemmer
from rapidfuzz.distance import LCSseq
from rapidfuzz.process import cpdist

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
_Tokens = str | tuple[int, ...]
"""A text with one character, or one number, per token."""

COLUMNS = ("references", "candidates.list.element.response")
"""What `rouge_l_batch` reads of the record, as `cappy.records.read_batches` takes it."""
CHUNK_CHARACTERS = 2**21
CHUNK_PAIRS = 2**17
"""Sizes of a chunk, at which the arrays on the way stay within some tens of MB."""
_CHARACTERS = 0x110000 - 0x800
"""How many characters there are to stand for tokens, surrogates aside."""
_IS_WORD = np.zeros(256, dtype=np.bool_)
_IS_WORD[[*b"abcdefghijklmnopqrstuvwxyz0123456789"]] = True

_WORDS = re.compile(r"[a-z0-9]+")
_UNSEEN = re.compile(r"[^\W_a-z0-9]|[\u0300-\u036f]")
_STEMMER = PorterStemmer()
_LONGEST_CACHED = 4_096
"""Characters of the longest text whose tokens are kept: the cache stays small whatever the texts."""
_LONGEST_WORD = 64
_NO_SUFFIX_ENDS = frozenset("0123456789abfhjkopquvwxz")
"""Last characters of no suffix that Porter's rules know: such a word is its own stem."""
# Scripts that put no space between words: there a token is one character with its marks.
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}"
_UNICODE_TOKEN = regex.compile(
    rf"(?V1)[[{_UNSPACED}]&&\p{{L}}]\p{{M}}*|[[\p{{L}}\p{{N}}\p{{M}}]--[[{_UNSPACED}]&&\p{{L}}]]+"
)


def rouge_l(references: Sequence[str], response: str, *, use_stemmer: bool = True) -> float:
    """Rouge-L F1 of a response, 0 to 1: the maximum over the references (Lin 2004; Cappy §4 scores it so).

    Tokens are lower-case runs of [a-z0-9]; longer than three characters they are Porter-stemmed. A response or a
    reference without tokens scores 0, non-Latin text among them.
    """
    tokens = _tokenize(response, use_stemmer)
    return max((_f_measure(_tokenize(reference, use_stemmer), tokens) for reference in references), default=0.0)


def _tokenize(text: str, use_stemmer: bool = True) -> tuple[str, ...]:
    """The tokens of a text, stemmed unless the caller says otherwise."""
    return _cached_tokens(text, use_stemmer) if len(text) <= _LONGEST_CACHED else _split_tokens(text, use_stemmer)


def is_visible(text: str) -> bool:
    """Whether Rouge-L sees anything of a text."""
    return _WORDS.search(text.lower()) is not None


def is_partly_visible(text: str) -> bool:
    """Whether Rouge-L sees something of a text, but not all of its letters and digits: 2008年, naïve, 5 m²."""
    if text.isascii():
        return False
    lowered = text.lower()
    return _WORDS.search(lowered) is not None and _UNSEEN.search(lowered) is not None


def _f_measure(target: Sequence[Hashable], prediction: Sequence[Hashable]) -> float:
    """F1 of the longest common subsequence of two token sequences, 0 to 1; the operations in the reference's order."""
    if not target or not prediction:
        return 0.0
    common = LCSseq.similarity(target, prediction)
    precision = common / len(prediction)
    recall = common / len(target)
    return 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0


def _stem(word: str) -> str:
    """The token that a word counts as: longer than three characters, its Porter stem."""
    if len(word) <= 3 or word[-1] in _NO_SUFFIX_ENDS:
        return word
    return _porter_stem(word) if len(word) <= _LONGEST_WORD else _STEMMER.stem(word)


def _split_tokens(text: str, use_stemmer: bool) -> tuple[str, ...]:
    words = _WORDS.findall(text.lower())
    return tuple(map(_stem, words)) if use_stemmer else tuple(words)


_cached_tokens = lru_cache(maxsize=8_192)(_split_tokens)


@lru_cache(maxsize=131_072)
def _porter_stem(word: str) -> str:
    return str(_STEMMER.stem(word))


def rouge_l_unicode(references: Sequence[str], response: str) -> float:
    """Rouge-L F1 of a response, 0 to 1, the best over the references, on the words of any script.

    Words are folded in case and width (NFKC), keep their marks and are not stemmed. In scripts without spaces every
    character with its marks is a word.
    """
    tokens = _unicode_tokens(response)
    return max((_f_measure(_unicode_tokens(reference), tokens) for reference in references), default=0.0)


@lru_cache(maxsize=65_536)
def _unicode_tokens(text: str) -> tuple[str, ...]:
    return tuple(_UNICODE_TOKEN.findall(unicodedata.normalize("NFKC", text).casefold()))


def rouge_l_columns(references: pa.ListArray, responses: pa.ListArray, *, use_stemmer: bool = True) -> pa.ListArray:
    """Rouge-L F1 of every response, 0 to 1, the maximum over its instance's references.

    `references` and `responses` are list<string> columns, one row per instance; what comes back is list<double>, shaped
    as `responses`. A null list counts as an empty one, and a null text as a blank one.
    """
    counts = [
        np.asarray(pc.list_value_length(column).fill_null(0), dtype=np.int64) for column in (references, responses)
    ]
    texts = pa.concat_arrays([references.flatten(), responses.flatten()]).fill_null("").dictionary_encode()
    index = np.asarray(texts.indices, dtype=np.int64)
    values = _best_f_measures(texts.dictionary.to_pylist(), index, counts[0], counts[1], use_stemmer)
    return pa.ListArray.from_arrays(pa.array(_offsets(counts[1]), pa.int32()), pa.array(values))


def rouge_l_batch(batch: pa.RecordBatch, *, use_stemmer: bool = True) -> pa.ListArray:
    """Rouge-L F1 of every candidate of a batch of the record, 0 to 1: list<double>, shaped as `candidates`.

    The batch needs the columns `COLUMNS` alone.
    """
    candidates = batch["candidates"]
    counts = np.asarray(pc.list_value_length(candidates).fill_null(0), dtype=np.int64)
    responses = candidates.flatten().field("response")
    column = pa.ListArray.from_arrays(pa.array(_offsets(counts), pa.int32()), responses)
    return rouge_l_columns(batch["references"], column, use_stemmer=use_stemmer)


def rouge_l_pools(
    references: Sequence[Sequence[str]], responses: Sequence[Sequence[str]], *, use_stemmer: bool = True
) -> Floats:
    """Rouge-L F1 of the responses of all instances in a row, 0 to 1, the maximum over the instance's references."""
    numbers: dict[str, int] = {}
    flat = chain.from_iterable((*references, *responses))
    index = np.fromiter((numbers.setdefault(text, len(numbers)) for text in flat), dtype=np.int64)
    counts = [np.fromiter(map(len, pools), dtype=np.int64, count=len(pools)) for pools in (references, responses)]
    return _best_f_measures(list(numbers), index, counts[0], counts[1], use_stemmer)


def token_strings(texts: Sequence[str], *, use_stemmer: bool = True) -> tuple[list[_Tokens], Ints]:
    """Each text with one character per token, equal within this call where the tokens are; and their lengths."""
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
    """The best F1 of each response; `index` names the text of every reference, then of every response."""
    first_reference, first_response = _offsets(num_references), _offsets(num_responses)
    targets, predictions = index[: first_reference[-1]], index[first_reference[-1] :]
    sizes = np.fromiter(map(len, texts), dtype=np.int64, count=len(texts))
    characters = _sums(sizes[targets], first_reference) + _sums(sizes[predictions], first_response)
    best = np.zeros(len(predictions))
    for start, stop in _chunks(characters, num_references * num_responses):
        here = slice(first_response[start], first_response[stop])
        best[here] = _score_chunk(
            texts,
            targets[first_reference[start] : first_reference[stop]],
            predictions[here],
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
    used, local = np.unique(np.concatenate([targets, predictions]), return_inverse=True)
    strings, lengths = token_strings([texts[number] for number in used.tolist()], use_stemmer=use_stemmer)
    targets, predictions = local[: len(targets)], local[len(targets) :]
    pairs_of = np.repeat(num_references, num_responses)
    first_pair = _offsets(pairs_of)
    first_target = np.repeat(_offsets(num_references)[:-1], num_responses)
    best = np.zeros(len(predictions))
    for start, stop in _chunks(pairs_of, pairs_of):
        prediction = np.repeat(predictions[start:stop], pairs_of[start:stop])
        within = np.arange(first_pair[start], first_pair[stop]) - np.repeat(
            first_pair[start:stop], pairs_of[start:stop]
        )
        target = targets[np.repeat(first_target[start:stop], pairs_of[start:stop]) + within]
        values = _pairwise_f_measures(strings, lengths, target, prediction)
        some = pairs_of[start:stop] > 0
        best[start:stop][some] = np.maximum.reduceat(values, (first_pair[start:stop] - first_pair[start])[some])
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
    """Number of every token of all texts in a row, and where each text's begin and end."""
    lowered = [text.lower() for text in texts]
    # One byte for each character, so that lengths hold; what is not ASCII separates words, as everything else does.
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
    """Ranges of rows within the limits of a chunk, or of one row alone."""
    start, text, work = 0, 0, 0
    for row, (size, count) in enumerate(zip(characters.tolist(), pairs.tolist(), strict=True)):
        if row > start and (text + size > CHUNK_CHARACTERS or work + count > CHUNK_PAIRS):
            yield start, row
            start, text, work = row, 0, 0
        text, work = text + size, work + count
    if start < len(characters):
        yield start, len(characters)


def _offsets(counts: Ints) -> Ints:
    return np.append(0, np.cumsum(counts))


def _sums(values: Ints, offsets: Ints) -> Ints:
    totals = _offsets(values)
    sums: Ints = totals[offsets[1:]] - totals[offsets[:-1]]
    return sums
