"""Rouge-L of whole columns: the numbers of `rouge`, for every response of many instances at once.

Distinct texts are tokenised together, over their bytes; distinct words are stemmed once; each text becomes a string
with one character per token, because the longest common subsequence of strings is what rapidfuzz computes fastest
(bit-parallel: linear memory, 64 cells a step). Work goes by chunks of instances, so memory does not grow with rows.
"""

from collections.abc import Iterator, Sequence
from itertools import chain, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from rapidfuzz.distance import LCSseq
from rapidfuzz.process import cpdist

from cappy.annotation.rouge import stem

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

COLUMNS = ("references", "candidates.list.element.response")
"""What `rouge_l_batch` reads of the record, as `cappy.records.read_batches` takes it."""
CHUNK_CHARACTERS = 2**21
CHUNK_PAIRS = 2**17
"""Sizes of a chunk, at which the arrays on the way stay within some tens of MB."""
_CHARACTERS = 0x110000 - 0x800
"""How many characters there are to stand for tokens, surrogates aside."""

_IS_WORD = np.zeros(256, dtype=np.bool_)
_IS_WORD[[*b"abcdefghijklmnopqrstuvwxyz0123456789"]] = True


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
    values = _best(texts.dictionary.to_pylist(), index, counts[0], counts[1], use_stemmer)
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
    return _best(list(numbers), index, counts[0], counts[1], use_stemmer)


def token_strings(texts: Sequence[str], *, use_stemmer: bool = True) -> tuple[list[Any], Ints]:
    """Each text with one character per token, equal within this call where the tokens are; and their lengths."""
    ids, bounds = _token_ids(texts, use_stemmer)
    ends = bounds.tolist()
    if len(ids) and ids.max() >= _CHARACTERS:
        return [tuple(ids[start:end].tolist()) for start, end in pairwise(ends)], np.diff(bounds)
    points = np.where(ids >= 0xD800, ids + 0x800, ids).astype("<u4")
    characters = points.tobytes().decode("utf-32-le")
    return [characters[start:end] for start, end in pairwise(ends)], np.diff(bounds)


def _best(texts: Sequence[str], index: Ints, num_references: Ints, num_responses: Ints, use_stemmer: bool) -> Floats:
    """The best F1 of each response; `index` names the text of every reference, then of every response."""
    first_reference, first_response = _offsets(num_references), _offsets(num_responses)
    targets, predictions = index[: first_reference[-1]], index[first_reference[-1] :]
    sizes = np.fromiter(map(len, texts), dtype=np.int64, count=len(texts))
    characters = _sums(sizes[targets], first_reference) + _sums(sizes[predictions], first_response)
    best = np.zeros(len(predictions))
    for start, stop in _chunks(characters, num_references * num_responses):
        here = slice(first_response[start], first_response[stop])
        best[here] = _chunk(
            texts,
            targets[first_reference[start] : first_reference[stop]],
            predictions[here],
            num_references[start:stop],
            num_responses[start:stop],
            use_stemmer,
        )
    return best


def _chunk(
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
        values = _f_measures(strings, lengths, target, prediction)
        some = pairs_of[start:stop] > 0
        best[start:stop][some] = np.maximum.reduceat(values, (first_pair[start:stop] - first_pair[start])[some])
    return best


def _f_measures(strings: Sequence[Any], lengths: Ints, targets: Ints, predictions: Ints) -> Floats:
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
        stems = pa.array(map(stem, words.dictionary.to_pylist()), pa.string()).dictionary_encode()
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
