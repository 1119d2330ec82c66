"""Encodes pairs as token ids; pairs that are too long are truncated in the middle of the instruction."""

import logging
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from cappy.errors import ConfigError, FolderError, quote
from cappy.scoring.config import Truncation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Pair = tuple[str, str]
_REMEDY = "save the tokenizer that the scorer was trained with in its folder"


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """Model inputs of one pair: token ids and token types. `whole` is true if neither text was truncated."""

    ids: tuple[int, ...]
    types: tuple[int, ...]
    response_truncated: bool = False
    whole: bool = True


@dataclass(frozen=True, slots=True)
class _PairFormat:
    """The tokens that a tokenizer puts before, between and after the two texts of a pair, with their type ids.

    `text_types` are the types of the tokens of the first and of the second text, `special_token_types` those of the
    tokens before, between and after them.
    """

    before: tuple[int, ...]
    between: tuple[int, ...]
    after: tuple[int, ...]
    text_types: tuple[int, int]
    special_token_types: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    has_token_types: bool

    @property
    def length(self) -> int:
        return len(self.before) + len(self.between) + len(self.after)


def as_pairs(pairs: Iterable[Sequence[str]]) -> list[Pair]:
    """Converts sequences of two texts to tuples. Raises ConfigError for anything else.

    A string of two characters is not a pair, although Python could unpack it.
    """
    tuples = [pair if type(pair) is tuple else _as_pair(pair) for pair in pairs]
    for pair in tuples:
        if len(pair) != 2 or not isinstance(pair[0], str) or not isinstance(pair[1], str):
            raise _pair_error(pair)
    return tuples  # type: ignore[return-value]


def _as_pair(pair: object) -> tuple[str, ...]:
    if isinstance(pair, str | bytes | Mapping):
        raise _pair_error(pair)
    try:
        return tuple(pair)  # type: ignore[arg-type]
    except TypeError:
        raise _pair_error(pair) from None


def _pair_error(pair: object) -> ConfigError:
    return ConfigError(f"score: a pair must be [instruction, response], two texts, got {quote(repr(pair), 80)}")


class PairEncoder:
    """Encodes pairs exactly as `tokenizer(instruction, response)` does if they fit into `max_length`.

    If they do not fit, the instruction is truncated in the middle (the task often comes first, the question last); a
    response that is too long alone is truncated at its end. The truncation `longest_first` is instead that of
    transformers' `truncation=True`, as used by CrossEncoder and the published run: the longer text is truncated at its
    end until both are equally long; after that, both are truncated. Token types are those that the tokenizer returns by
    default; if it returns none (`has_token_types` is false), they are zeros.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", max_length: int, truncation: Truncation = "middle"
    ) -> None:
        self._tokenizer = tokenizer
        self._format = _find_pair_format(tokenizer)
        self._backend = _copy_backend(tokenizer)
        self.max_length = max_length
        self.truncation = truncation
        self._from_left = getattr(tokenizer, "truncation_side", "right") == "left"
        self.has_token_types = self._format.has_token_types

    def encode(self, pairs: Sequence[Pair]) -> list[EncodedPair]:
        """Encodes pairs, in order; every distinct text is tokenized once."""
        tokens = self._tokenize_pairs(pairs)
        return [self.join(tokens[instruction], tokens[response]) for instruction, response in pairs]

    def fits(self, pairs: Sequence[Pair]) -> list[bool]:
        """Whether each pair fits without truncation."""
        tokens, available = self._tokenize_pairs(pairs), self.max_length - self._format.length
        return [len(tokens[instruction]) + len(tokens[response]) <= available for instruction, response in pairs]

    @property
    def num_special_tokens(self) -> int:
        """Number of tokens of a pair besides those of its two texts."""
        return self._format.length

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        """The token ids of each text, without special tokens. Raises FolderError if the tokenizer fails on a text."""
        if not texts:
            return []
        try:
            if self._backend is not None:
                return [encoded.ids for encoded in self._backend.encode_batch_fast(texts, add_special_tokens=False)]
            ids: list[list[int]] = self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        except BaseException as error:
            # The tokenizers library (Rust) panics if a pattern fails on a text; that is not an Exception.
            if type(error).__name__ != "PanicException":
                raise
            raise FolderError(f"the scorer's tokenizer failed on a text ({quote(str(error), 80)}); {_REMEDY}") from None
        return ids

    def _tokenize_pairs(self, pairs: Sequence[Pair]) -> dict[str, list[int]]:
        """The token ids of every distinct text of the pairs."""
        texts = list(dict.fromkeys(text for pair in pairs for text in pair))
        return dict(zip(texts, self.tokenize(texts), strict=True))

    def join(self, instruction: list[int], response: list[int]) -> EncodedPair:
        """The encoded pair of two tokenized texts."""
        pair_format, available = self._format, self.max_length - self._format.length
        num_response, whole = len(response), len(instruction) + len(response) <= available
        if self.truncation == "longest_first":
            lengths = _longest_first_lengths(len(instruction), len(response), available)
            instruction, response = self._truncate(instruction, lengths[0]), self._truncate(response, lengths[1])
        else:
            response = response[:available]
            instruction = _truncate_middle(instruction, available - len(response))
        first, second = pair_format.text_types
        before, between, after = pair_format.special_token_types
        return EncodedPair(
            ids=(*pair_format.before, *instruction, *pair_format.between, *response, *pair_format.after),
            types=(*before, *(first,) * len(instruction), *between, *(second,) * len(response), *after),
            response_truncated=len(response) < num_response,
            whole=whole,
        )

    def _truncate(self, tokens: list[int], count: int) -> list[int]:
        """The first `count` tokens of a text, or the last ones if the tokenizer truncates on the left."""
        return tokens[len(tokens) - count :] if self._from_left else tokens[:count]


def _copy_backend(tokenizer: "PreTrainedTokenizerBase") -> Tokenizer | None:
    """A copy of a fast tokenizer's backend without truncation, whose options no other thread can change."""
    if not getattr(tokenizer, "is_fast", False):
        return None
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    # The serialised tokenizer does not include whether special tokens in a text are read as plain characters.
    backend.encode_special_tokens = bool(getattr(tokenizer, "split_special_tokens", False))
    return backend


def _truncate_middle(tokens: list[int], available: int) -> list[int]:
    """The first and the last tokens of a text, `available` in total."""
    if len(tokens) <= available:
        return tokens
    head = (available + 1) // 2
    return tokens[:head] + tokens[len(tokens) - (available - head) :]


def _longest_first_lengths(instruction: int, response: int, available: int) -> tuple[int, int]:
    """How many tokens of each text are kept, as in the tokenizers library (`longest_first`).

    The shorter text is kept whole if it takes at most half of `available`; else each text gets half, and the longer one
    (or the response, if equal) the odd token.
    """
    shorter, longer = sorted((instruction, response))
    if shorter + longer > available:
        shorter = min(shorter, available // 2)
        longer = available - shorter
    return (longer, shorter) if instruction > response else (shorter, longer)


def _find_pair_format(tokenizer: "PreTrainedTokenizerBase") -> _PairFormat:
    """Derives the pair format from the tokenizer's encoding of the pair ("a", "b")."""
    first, second = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a", "b"))
    probe = tokenizer("a", "b")
    ids = list(probe["input_ids"])
    types = list(probe.get("token_type_ids") or [0] * len(ids))
    start = _find_tokens(ids, first, 0)
    middle = start + len(first)
    end = _find_tokens(ids, second, middle)
    after = end + len(second)
    return _PairFormat(
        before=tuple(ids[:start]),
        between=tuple(ids[middle:end]),
        after=tuple(ids[after:]),
        text_types=(types[start], types[end]),
        special_token_types=(tuple(types[:start]), tuple(types[middle:end]), tuple(types[after:])),
        has_token_types="token_type_ids" in probe,
    )


def _find_tokens(ids: list[int], part: list[int], start: int) -> int:
    """The index of `part` in `ids`, from `start` on. Raises FolderError if it is not in there."""
    for index in range(start, len(ids)):
        if ids[index : index + len(part)] == part:
            return index
    raise FolderError(f"the scorer's tokenizer encodes the texts of a pair differently than alone; {_REMEDY}")


LOGGER = logging.getLogger(__name__)


class TruncationCounts:
    """Counts the pairs that a scorer encoded, the truncated ones among them, and those whose response was truncated.

    Equal pairs of a call count once. The first truncation is logged, unless `log_first` is false because the caller
    reports the counts.
    """

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length
        self.pairs = self.truncated_pairs = self.truncated_responses = 0
        self.log_first = True
        self._lock = threading.Lock()

    def count(self, encoded: Sequence[EncodedPair]) -> None:
        """Counts encoded pairs."""
        num_truncated = sum(not pair.whole for pair in encoded)
        with self._lock:
            is_first = num_truncated > 0 and self.truncated_pairs == 0
            self.pairs += len(encoded)
            self.truncated_pairs += num_truncated
            self.truncated_responses += sum(pair.response_truncated for pair in encoded)
        if is_first and self.log_first:
            LOGGER.warning(
                "a pair is longer than the scorer's %d tokens and is truncated; this is logged only once",
                self.max_length,
            )

    def text(self) -> str:
        """The counts as a sentence; empty if nothing was truncated."""
        if not self.truncated_pairs:
            return ""
        responses = f", {self.truncated_responses:,} responses truncated" if self.truncated_responses else ""
        limit = f"the scorer's {self.max_length} tokens"
        return f"{self.truncated_pairs:,} of {self.pairs:,} pairs are longer than {limit} and were truncated{responses}"
