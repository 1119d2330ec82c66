"""Stores instances as token ids on disk: tokenized once per folder and tokenizer, then memory-mapped.

Memory use does not grow with the number of rows, neither when a corpus is written nor when it is read.
"""

import contextlib
import hashlib
import itertools
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cappy.annotation.labels import regression_rows
from cappy.config import fingerprint
from cappy.files import hold_lock, make_private
from cappy.progress import Progress, silent
from cappy.records import Instance, prompt_hash, read, read_manifest
from cappy.records.folder import batched, disk_errors, rename_folder
from cappy.records.instance import SOURCES, Source
from cappy.scoring.encoding import EncodedPair, PairEncoder
from cappy.training.settings import Unit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT_VERSION = 2
"""Increase it when the format of the arrays changes."""
ARRAY_DTYPES: Mapping[str, str] = {
    "tokens": "<u4",  # per instance: the instruction's tokens, then those of each response
    "text_ends": "<u8",  # end of each text, as an index in `tokens`
    "pair_ends": "<u8",  # end of each instance, as an index in `labels`
    "labels": "<f8",
    "selectable": "<u1",
    "sources": "<u1",  # index in SOURCES, per response
    "names": "<u1",  # instance ids, UTF-8
    "name_ends": "<u8",
}
"""The arrays of a corpus and their dtypes; `tokens` is <u2 if the vocabulary is small enough."""
_FACTS = "facts.json"
_HAS_TRAIN = "has_train"
_PROMPTS = "prompts"
"""File with the hash of each prompt. It is written last, so a folder that contains it is complete."""
COUNT_CHUNK = 2**16
"""Instances per chunk when truncated pairs are counted; this bounds memory."""
CHUNK = 512
"""Instances tokenized at a time; this bounds memory."""


@dataclass(frozen=True, slots=True)
class TrainingInstance:
    """One instance for training: responses with their labels, whether each is selectable, and their sources."""

    instruction: str
    responses: tuple[str, ...]
    labels: tuple[float, ...]
    selectable: tuple[bool, ...]
    sources: tuple[Source, ...]


def to_training_instance(instance: Instance, metric: str, sources: Sequence[Source] = ()) -> TrainingInstance:
    """Converts an instance to its rows of the regression set, only those from `sources` if any are given.

    Raises RecordError if a candidate has no label of this metric.
    """
    rows = [row for row in regression_rows(instance, metric) if not sources or row.source in sources]
    selectable = {candidate.response for candidate in instance.selectable}
    return TrainingInstance(
        instruction=instance.instruction,
        responses=tuple(row.response for row in rows),
        labels=tuple(row.label for row in rows),
        selectable=tuple(row.response in selectable for row in rows),
        sources=tuple(row.source for row in rows),
    )


def split_rows(instance: TrainingInstance) -> list[TrainingInstance]:
    """One training instance per response, for `--unit row`."""
    columns = zip(instance.responses, instance.labels, instance.selectable, instance.sources, strict=True)
    return [
        TrainingInstance(instance.instruction, (text,), (label,), (is_selectable,), (source,))
        for text, label, is_selectable, source in columns
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Totals of a corpus: instances, pairs, the longest instruction and response in tokens, the range of labels."""

    instances: int = 0
    pairs: int = 0
    longest_instruction: int = 0
    longest_response: int = 0
    lowest: float = 1.0
    highest: float = 0.0
    token_type: str = ARRAY_DTYPES["tokens"]


class Corpus:
    """The instances of one split, by index: token ids, labels, sources and which responses are selectable.

    The argument `responses` of the methods is a sequence of response indices, each 0 to `size(index)` - 1.
    """

    def __init__(self, folder: Path, encoder: PairEncoder) -> None:
        self.facts = Facts(**json.loads((folder / _FACTS).read_text()))
        self._encoder = encoder
        dtypes = {**ARRAY_DTYPES, "tokens": self.facts.token_type}
        arrays = {name: _memmap(folder / name, dtype) for name, dtype in dtypes.items()}
        self._tokens, self._text_ends, self._pair_ends = (arrays[n] for n in ("tokens", "text_ends", "pair_ends"))
        self._labels, self._selectable, self._sources = (arrays[n] for n in ("labels", "selectable", "sources"))
        self._names, self._name_ends = arrays["names"], arrays["name_ends"]

    def __len__(self) -> int:
        return self.facts.instances

    def size(self, index: int) -> int:
        """The number of responses of an instance."""
        return int(self._pair_ends[index]) - _start(self._pair_ends, index)

    def responses_per_epoch(self, max_candidates: int) -> int:
        """Responses drawn in one epoch, at most `max_candidates` per instance."""
        return int(np.minimum(np.diff(self._pair_ends, prepend=np.uint64(0)), max_candidates).sum())

    def name(self, index: int) -> str:
        """The instance's id."""
        start, end = _start(self._name_ends, index), int(self._name_ends[index])
        return bytes(self._names[start:end]).decode()

    def labels(self, index: int, responses: Sequence[int]) -> list[float]:
        """Labels of these responses, 0 to 1."""
        start = _start(self._pair_ends, index)
        return [float(self._labels[start + response]) for response in responses]

    def sources(self, index: int, responses: Sequence[int]) -> list[Source]:
        """The sources of these responses."""
        start = _start(self._pair_ends, index)
        return [SOURCES[self._sources[start + response]] for response in responses]

    def selectable(self, index: int) -> list[int]:
        """Indices of the responses that a selector may pick."""
        start, end = _start(self._pair_ends, index), int(self._pair_ends[index])
        return [int(response) for response in np.flatnonzero(self._selectable[start:end])]

    def pairs(self, index: int, responses: Sequence[int]) -> list[EncodedPair]:
        """The instruction encoded with each of these responses."""
        first = _start(self._pair_ends, index) + index  # Each earlier instance has one instruction and its responses.
        instruction = self._text(first)
        return [self._encoder.join(instruction, self._text(first + 1 + response)) for response in responses]

    def token_counts(self, index: int, responses: Sequence[int]) -> list[int]:
        """The number of tokens of the pair with each of these responses, after cutting."""
        first = _start(self._pair_ends, index) + index
        overhead = self._encoder.num_special_tokens + self._length(first)
        return [min(self._encoder.max_length, overhead + self._length(first + 1 + response)) for response in responses]

    def max_tokens(self, index: int, responses: Sequence[int]) -> int:
        """The number of tokens of the longest of these pairs, after cutting."""
        return max(self.token_counts(index, responses))

    @property
    def longest_pair(self) -> int:
        """An upper bound on the tokens of any pair."""
        pair_tokens = self._encoder.num_special_tokens + self.facts.longest_instruction + self.facts.longest_response
        return min(self._encoder.max_length, pair_tokens)

    @property
    def num_truncated_pairs(self) -> int:
        """The number of pairs that are longer than the scorer's maximum and are truncated."""
        return sum(
            self._count_truncated(start, min(start + COUNT_CHUNK, len(self)))
            for start in range(0, len(self), COUNT_CHUNK)
        )

    def _count_truncated(self, start: int, stop: int) -> int:
        """The number of truncated pairs of the instances in range(start, stop)."""
        ends = self._pair_ends[start:stop].astype(np.int64)
        sizes = np.diff(ends, prepend=_start(self._pair_ends, start))
        first, last = _start(self._pair_ends, start) + start, int(ends[-1]) + stop
        lengths = np.diff(self._text_ends[first:last].astype(np.int64), prepend=_start(self._text_ends, first))
        instruction_indices = np.cumsum(sizes + 1) - (sizes + 1)
        pair_lengths = np.delete(lengths, instruction_indices) + np.repeat(lengths[instruction_indices], sizes)
        return int((pair_lengths + self._encoder.num_special_tokens > self._encoder.max_length).sum())

    def _text(self, index: int) -> list[int]:
        ids: list[int] = self._tokens[_start(self._text_ends, index) : int(self._text_ends[index])].tolist()
        return ids

    def _length(self, index: int) -> int:
        return int(self._text_ends[index]) - _start(self._text_ends, index)


@dataclass(frozen=True, kw_only=True)
class Corpora:
    """The data of a training run: both splits, their sorted distinct prompt hashes, and their number of instances.

    `has_train` is false if the train split has no response of the sources in the settings.
    """

    train: Corpus
    validation: Corpus
    prompts: NDArray[np.uint64]
    instances: int
    has_train: bool


def open_corpora(
    source: Path,
    cache: Path,
    tokenizer: "PreTrainedTokenizerBase",
    encoder: PairEncoder,
    *,
    metric: str,
    sources: Sequence[Source],
    unit: Unit = "instance",
    progress: Progress = silent,
) -> Corpora:
    """Opens the corpora of a finished folder; tokenizes it into `cache` first if needed, locked between processes.

    The cache key is a hash of the folder's manifest, the tokenizer, the metric, and the sources and unit of the train
    split. The train split keeps instances with two or more responses (with unit `row`, each response by itself), the
    validation split those with a selectable response. Memory use is `CHUNK` instances, plus 8 bytes per instance read.
    """
    key = fingerprint(
        FORMAT_VERSION, read_manifest(source).hash, _tokenizer_hash(tokenizer), metric, list(sources), unit
    )[:24]
    folder = cache / key
    with disk_errors(folder), _lock(cache, key):
        if not (folder / _PROMPTS).is_file():
            _write_corpora(source, folder, encoder, len(tokenizer), metric, sources, unit, progress)
    prompts = _memmap(folder / _PROMPTS, "<u8")
    return Corpora(
        train=Corpus(folder / "train", encoder),
        validation=Corpus(folder / "validation", encoder),
        prompts=np.unique(prompts),
        instances=len(prompts),
        has_train=(folder / _HAS_TRAIN).exists(),
    )


def _tokenizer_hash(tokenizer: "PreTrainedTokenizerBase") -> str:
    """The SHA-256 of the tokenizer's class and definition."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(f"{type(tokenizer).__name__} {text}".encode()).hexdigest()


class CorpusWriter:
    """Writes the arrays of one split, chunk by chunk; they are complete when its block ends without an error."""

    def __init__(self, folder: Path, encoder: PairEncoder, vocabulary_size: int) -> None:
        folder.mkdir(parents=True)
        self._folder, self._encoder = folder, encoder
        self._facts = Facts(token_type="<u2" if vocabulary_size <= 2**16 else "<u4")
        self._dtypes = {**ARRAY_DTYPES, "tokens": self._facts.token_type}
        self._files: dict[str, IO[bytes]] = {name: (folder / name).open("wb") for name in ARRAY_DTYPES}
        self._ends = dict.fromkeys(("text_ends", "pair_ends", "name_ends"), 0)

    def __enter__(self) -> "CorpusWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        for file in self._files.values():
            file.close()
        if kind is None:
            (self._folder / _FACTS).write_text(json.dumps(asdict(self._facts)))

    def add(self, batch: Sequence[tuple[str, TrainingInstance]]) -> None:
        """Tokenizes and appends (id, instance) pairs."""
        if not batch:
            return
        instances = [instance for _, instance in batch]
        texts = [text for instance in instances for text in (instance.instruction, *instance.responses)]
        distinct = list(dict.fromkeys(texts))
        ids = dict(zip(distinct, self._encoder.tokenize(distinct), strict=True))
        names = [name.encode() for name, _ in batch]
        labels = [label for instance in instances for label in instance.labels]
        self._write("tokens", list(itertools.chain.from_iterable(ids[text] for text in texts)))
        self._write("labels", labels)
        self._write("selectable", [flag for instance in instances for flag in instance.selectable])
        self._write("sources", [SOURCES.index(source) for instance in instances for source in instance.sources])
        self._write("names", list(b"".join(names)))
        self._write_ends("text_ends", [len(ids[text]) for text in texts])
        self._write_ends("pair_ends", [len(instance.responses) for instance in instances])
        self._write_ends("name_ends", [len(name) for name in names])
        facts = self._facts
        self._facts = Facts(
            instances=facts.instances + len(batch),
            pairs=facts.pairs + len(labels),
            longest_instruction=max(
                facts.longest_instruction, *(len(ids[instance.instruction]) for instance in instances)
            ),
            longest_response=max(
                facts.longest_response, *(len(ids[text]) for instance in instances for text in instance.responses)
            ),
            lowest=min(facts.lowest, *labels),
            highest=max(facts.highest, *labels),
            token_type=facts.token_type,
        )

    def _write(self, name: str, values: ArrayLike) -> None:
        self._files[name].write(np.asarray(values, dtype=self._dtypes[name]).tobytes())

    def _write_ends(self, name: str, lengths: Sequence[int]) -> None:
        ends = self._ends[name] + np.cumsum(lengths, dtype=np.uint64)
        self._write(name, ends)
        self._ends[name] = int(ends[-1])


def _write_corpora(
    source: Path,
    folder: Path,
    encoder: PairEncoder,
    vocabulary_size: int,
    metric: str,
    sources: Sequence[Source],
    unit: Unit,
    progress: Progress,
) -> None:
    """Writes the corpora to a temporary folder, then renames it: a killed run leaves nothing that looks complete."""
    temporary = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    done = 0
    with (
        CorpusWriter(temporary / "train", encoder, vocabulary_size) as train,
        CorpusWriter(temporary / "validation", encoder, vocabulary_size) as validation,
        (temporary / _PROMPTS).open("wb") as prompts,
    ):
        for instances in batched(read(source, splits=("train", "validation")), CHUNK):
            prompts.write(np.array([prompt_hash(i.instruction) for i in instances], dtype="<u8").tobytes())
            for_train = [
                (i.instance_id, to_training_instance(i, metric, sources)) for i in instances if i.split == "train"
            ]
            for_validation = [
                (i.instance_id, to_training_instance(i, metric)) for i in instances if i.split == "validation"
            ]
            if any(instance.responses for _, instance in for_train):
                (temporary / _HAS_TRAIN).touch()
            if unit == "row":
                train.add([(name, row) for name, instance in for_train for row in split_rows(instance)])
            else:
                train.add([(name, instance) for name, instance in for_train if len(instance.responses) > 1])
            validation.add([(name, instance) for name, instance in for_validation if any(instance.selectable)])
            done += len(instances)
            progress(done, unit="instances tokenized")
    rename_folder(temporary, folder, last=_PROMPTS)


@contextlib.contextmanager
def _lock(cache: Path, key: str) -> Iterator[None]:
    """Holds a lock on the cache entry; it is released when the process ends, however it ends."""
    make_private(cache)
    with hold_lock(cache / f".{key}.lock"):
        yield


def _memmap(path: Path, dtype: str) -> NDArray[Any]:
    """The array in a file, memory-mapped."""
    return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.empty(0, dtype=dtype)


def _start(ends: NDArray[np.uint64], index: int) -> int:
    """Where the item of this index starts: at the end of the previous one."""
    return int(ends[index - 1]) if index else 0
