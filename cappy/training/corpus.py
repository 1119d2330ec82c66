"""Instances as token ids on disk: tokenized once per folder and tokenizer, then memory-mapped.

Memory does not grow with rows, neither while a corpus is written nor while it is read.
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
"""Counted up where the arrays change."""
ARRAY_DTYPES: Mapping[str, str] = {
    "tokens": "<u4",  # of each instance: the instruction's, then each response's
    "text_ends": "<u8",  # where each text ends in `tokens`
    "pair_ends": "<u8",  # where each instance ends in `labels`
    "labels": "<f8",
    "selectable": "<u1",
    "sources": "<u1",  # of each response, its place in SOURCES
    "names": "<u1",  # instance ids, UTF-8
    "name_ends": "<u8",
}
"""The arrays of a corpus and their types; `tokens` is narrower where the vocabulary allows it."""
_FACTS = "facts.json"
_HAS_TRAIN = "has_train"
_PROMPTS = "prompts"
"""The hash of each prompt; the last file to be there, by which a folder is known to be whole."""
COUNT_CHUNK = 2**16
"""Instances whose lengths are in memory at a time while the cut pairs are counted."""
CHUNK = 512
"""Instances tokenized at a time: what memory holds."""


@dataclass(frozen=True, slots=True)
class TrainingInstance:
    """One instance as training sees it: responses, labels, which a selector may pick, and where they came from."""

    instruction: str
    responses: tuple[str, ...]
    labels: tuple[float, ...]
    selectable: tuple[bool, ...]
    sources: tuple[Source, ...]


def to_training_instance(instance: Instance, metric: str, sources: Sequence[Source] = ()) -> TrainingInstance:
    """The instance's rows of the regression set, of these sources if any are named.

    RecordError where a candidate has no label of this metric.
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


def split_rows(group: TrainingInstance) -> list[TrainingInstance]:
    """One group per response, for training in rows."""
    columns = zip(group.responses, group.labels, group.selectable, group.sources, strict=True)
    return [TrainingInstance(group.instruction, (text,), (label,), (may,), (source,)) for text, label, may, source in columns]


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What is known of a corpus beside its arrays: instances, longest response and instruction, range of labels."""

    instances: int = 0
    pairs: int = 0
    longest_instruction: int = 0
    longest_response: int = 0
    lowest: float = 1.0
    highest: float = 0.0
    token_type: str = ARRAY_DTYPES["tokens"]


class Corpus:
    """Instances of one split, by number: their responses as token ids, labels, and what a selector may pick."""

    def __init__(self, folder: Path, encoder: PairEncoder) -> None:
        self.facts = Facts(**json.loads((folder / _FACTS).read_text()))
        self._encoder = encoder
        kinds = {**ARRAY_DTYPES, "tokens": self.facts.token_type}
        arrays = {name: _memmap(folder / name, kind) for name, kind in kinds.items()}
        self._tokens, self._text_ends, self._pair_ends = (arrays[n] for n in ("tokens", "text_ends", "pair_ends"))
        self._labels, self._selectable, self._sources = (arrays[n] for n in ("labels", "selectable", "sources"))
        self._names, self._name_ends = arrays["names"], arrays["name_ends"]

    def __len__(self) -> int:
        return self.facts.instances

    def size(self, index: int) -> int:
        """Responses of an instance."""
        return int(self._pair_ends[index]) - _start(self._pair_ends, index)

    def responses_per_epoch(self, most: int) -> int:
        """Responses that one pass draws, at most `most` of each instance."""
        return int(np.minimum(np.diff(self._pair_ends, prepend=np.uint64(0)), most).sum())

    def name(self, index: int) -> str:
        """The instance's id."""
        start, end = _start(self._name_ends, index), int(self._name_ends[index])
        return bytes(self._names[start:end]).decode()

    def labels(self, index: int, chosen: Sequence[int]) -> list[float]:
        """Labels of these responses, 0 to 1."""
        start = _start(self._pair_ends, index)
        return [float(self._labels[start + number]) for number in chosen]

    def sources(self, index: int, chosen: Sequence[int]) -> list[Source]:
        """Where these responses came from."""
        start = _start(self._pair_ends, index)
        return [SOURCES[self._sources[start + number]] for number in chosen]

    def selectable(self, index: int) -> list[int]:
        """Numbers of the responses that a selector may pick."""
        start, end = _start(self._pair_ends, index), int(self._pair_ends[index])
        return [int(number) for number in np.flatnonzero(self._selectable[start:end])]

    def pairs(self, index: int, chosen: Sequence[int]) -> list[EncodedPair]:
        """The instruction with each of these responses, as the model reads them."""
        first = _start(self._pair_ends, index) + index  # every instance before has its responses and one instruction
        instruction = self._text(first)
        return [self._encoder.join(instruction, self._text(first + 1 + number)) for number in chosen]

    def tokens(self, index: int, chosen: Sequence[int]) -> list[int]:
        """Tokens of each of these pairs, as the model reads them."""
        first = _start(self._pair_ends, index) + index
        around = self._encoder.num_special_tokens + self._length(first)
        return [min(self._encoder.max_length, around + self._length(first + 1 + number)) for number in chosen]

    def longest_of(self, index: int, chosen: Sequence[int]) -> int:
        """Tokens of the longest of these pairs."""
        return max(self.tokens(index, chosen))

    @property
    def longest_pair(self) -> int:
        """A bound on the tokens of any pair."""
        whole = self._encoder.num_special_tokens + self.facts.longest_instruction + self.facts.longest_response
        return min(self._encoder.max_length, whole)

    @property
    def cut_pairs(self) -> int:
        """How many pairs have more tokens than the scorer reads."""
        return sum(self._count_cut(start, min(start + COUNT_CHUNK, len(self))) for start in range(0, len(self), COUNT_CHUNK))

    def _count_cut(self, start: int, stop: int) -> int:
        """The same of the instances from `start` to before `stop`."""
        ends = self._pair_ends[start:stop].astype(np.int64)
        sizes = np.diff(ends, prepend=_start(self._pair_ends, start))
        first, last = _start(self._pair_ends, start) + start, int(ends[-1]) + stop
        lengths = np.diff(self._text_ends[first:last].astype(np.int64), prepend=_start(self._text_ends, first))
        instructions = np.cumsum(sizes + 1) - (sizes + 1)
        pairs = np.delete(lengths, instructions) + np.repeat(lengths[instructions], sizes)
        return int((pairs + self._encoder.num_special_tokens > self._encoder.max_length).sum())

    def _text(self, number: int) -> list[int]:
        ids: list[int] = self._tokens[_start(self._text_ends, number) : int(self._text_ends[number])].tolist()
        return ids

    def _length(self, number: int) -> int:
        return int(self._text_ends[number]) - _start(self._text_ends, number)


@dataclass(frozen=True, kw_only=True)
class Corpora:
    """What training reads of a folder: both splits, their sorted prompt hashes, and how many instances these are.

    `has_train` is false where not one response of the train split is of the sources asked for.
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
    """The corpora of a finished folder, from `cache` or tokenized into it now; other processes wait meanwhile.

    Kept under a hash of the folder's manifest, the tokenizer, the metric, and the sources and unit of the train split.
    Of that one stand instances with two responses or more (of the unit `row` every response by itself), of the
    validation split those with a response that a selector may pick. Memory holds `CHUNK` instances, and 8 bytes of
    every instance read.
    """
    key = fingerprint(FORMAT_VERSION, read_manifest(source).hash, _tokenizer_hash(tokenizer), metric, list(sources), unit)[:24]
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
    """sha256 over what decides what a tokenizer makes of a text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(f"{type(tokenizer).__name__} {text}".encode()).hexdigest()


class CorpusWriter:
    """Writes the arrays of one split, part by part; finished when its block ends well."""

    def __init__(self, folder: Path, encoder: PairEncoder, vocabulary: int) -> None:
        folder.mkdir(parents=True)
        self._folder, self._encoder = folder, encoder
        self._facts = Facts(token_type="<u2" if vocabulary <= 2**16 else "<u4")
        self._kinds = {**ARRAY_DTYPES, "tokens": self._facts.token_type}
        self._files: dict[str, IO[bytes]] = {name: (folder / name).open("wb") for name in ARRAY_DTYPES}
        self._ends = dict.fromkeys(("text_ends", "pair_ends", "name_ends"), 0)

    def __enter__(self) -> "CorpusWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        for file in self._files.values():
            file.close()
        if kind is None:
            (self._folder / _FACTS).write_text(json.dumps(asdict(self._facts)))

    def add(self, part: Sequence[tuple[str, TrainingInstance]]) -> None:
        """Tokenizes these instances, each with its id, and appends them."""
        if not part:
            return
        groups = [group for _, group in part]
        texts = [text for group in groups for text in (group.instruction, *group.responses)]
        distinct = list(dict.fromkeys(texts))
        ids = dict(zip(distinct, self._encoder.tokens(distinct), strict=True))
        names = [name.encode() for name, _ in part]
        labels = [label for group in groups for label in group.labels]
        self._write("tokens", list(itertools.chain.from_iterable(ids[text] for text in texts)))
        self._write("labels", labels)
        self._write("selectable", [flag for group in groups for flag in group.selectable])
        self._write("sources", [SOURCES.index(source) for group in groups for source in group.sources])
        self._write("names", list(b"".join(names)))
        self._write_ends("text_ends", [len(ids[text]) for text in texts])
        self._write_ends("pair_ends", [len(group.responses) for group in groups])
        self._write_ends("name_ends", [len(name) for name in names])
        old = self._facts
        self._facts = Facts(
            instances=old.instances + len(part),
            pairs=old.pairs + len(labels),
            longest_instruction=max(old.longest_instruction, *(len(ids[g.instruction]) for g in groups)),
            longest_response=max(old.longest_response, *(len(ids[text]) for g in groups for text in g.responses)),
            lowest=min(old.lowest, *labels),
            highest=max(old.highest, *labels),
            token_type=old.token_type,
        )

    def _write(self, name: str, values: ArrayLike) -> None:
        self._files[name].write(np.asarray(values, dtype=self._kinds[name]).tobytes())

    def _write_ends(self, name: str, lengths: Sequence[int]) -> None:
        ends = self._ends[name] + np.cumsum(lengths, dtype=np.uint64)
        self._write(name, ends)
        self._ends[name] = int(ends[-1])


def _write_corpora(
    source: Path,
    folder: Path,
    encoder: PairEncoder,
    vocabulary: int,
    metric: str,
    sources: Sequence[Source],
    unit: Unit,
    progress: Progress,
) -> None:
    """Writes the corpora under a temporary name and renames: a killed build leaves nothing that looks finished."""
    temporary = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    done = 0
    with (
        CorpusWriter(temporary / "train", encoder, vocabulary) as train,
        CorpusWriter(temporary / "validation", encoder, vocabulary) as validation,
        (temporary / _PROMPTS).open("wb") as prompts,
    ):
        for part in batched(read(source, splits=("train", "validation")), CHUNK):
            prompts.write(np.array([prompt_hash(i.instruction) for i in part], dtype="<u8").tobytes())
            fitted = [(i.instance_id, to_training_instance(i, metric, sources)) for i in part if i.split == "train"]
            checked = [(i.instance_id, to_training_instance(i, metric)) for i in part if i.split == "validation"]
            if any(group.responses for _, group in fitted):
                (temporary / _HAS_TRAIN).touch()
            if unit == "row":
                train.add([(name, row) for name, group in fitted for row in split_rows(group)])
            else:
                train.add([(name, group) for name, group in fitted if len(group.responses) > 1])
            validation.add([(name, group) for name, group in checked if any(group.selectable)])
            done += len(part)
            progress(done, unit="instances tokenized")
    rename_folder(temporary, folder, last=_PROMPTS)


@contextlib.contextmanager
def _lock(cache: Path, key: str) -> Iterator[None]:
    """Holds a lock that falls with the process, however it ends."""
    make_private(cache)
    with hold_lock(cache / f".{key}.lock"):
        yield


def _memmap(path: Path, kind: str) -> NDArray[Any]:
    """The numbers of a file, read from the disk as they are used."""
    return np.memmap(path, dtype=kind, mode="r") if path.stat().st_size else np.empty(0, dtype=kind)


def _start(ends: NDArray[np.uint64], index: int) -> int:
    return int(ends[index - 1]) if index else 0
