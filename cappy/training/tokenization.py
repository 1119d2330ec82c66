"""From a folder of annotated instances to token ids on disk, once per folder and tokenizer."""

import contextlib
import hashlib
import itertools
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from cappy.config import fingerprint
from cappy.files import hold_lock, make_private
from cappy.progress import Progress, silent
from cappy.records import prompt_hash, read, read_manifest
from cappy.records.folder import batched, disk_errors, rename_folder
from cappy.records.instance import SOURCES, Source
from cappy.scoring.encoding import PairEncoder
from cappy.training.corpus import FACTS, FILES, Corpus, Facts, mapped
from cappy.training.feed import Group, split_rows, to_group
from cappy.training.plan import Unit

HAS_TRAIN = "has_train"
PROMPTS = "prompts"
"""The hash of each prompt; the last file to be there, by which a folder is known to be whole."""
FORMAT = 2
"""Counted up where the arrays change."""
CHUNK = 512
"""Instances tokenized at a time: what memory holds."""

Named = tuple[str, Group]


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
    tokenizer: Any,
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
    key = fingerprint(FORMAT, read_manifest(source).hash, tokenizer_hash(tokenizer), metric, list(sources), unit)[:24]
    folder = cache / key
    with disk_errors(folder), _held(cache, key):
        if not (folder / PROMPTS).is_file():
            _build(source, folder, encoder, len(tokenizer), metric, sources, unit, progress)
    prompts = mapped(folder / PROMPTS, "<u8")
    return Corpora(
        train=Corpus(folder / "train", encoder),
        validation=Corpus(folder / "validation", encoder),
        prompts=np.unique(prompts),
        instances=len(prompts),
        has_train=(folder / HAS_TRAIN).exists(),
    )


def tokenizer_hash(tokenizer: Any) -> str:
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
        self._kinds = {**FILES, "tokens": self._facts.token_type}
        self._files: dict[str, IO[bytes]] = {name: (folder / name).open("wb") for name in FILES}
        self._ends = dict.fromkeys(("text_ends", "pair_ends", "name_ends"), 0)

    def __enter__(self) -> "CorpusWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        for file in self._files.values():
            file.close()
        if kind is None:
            (self._folder / FACTS).write_text(json.dumps(asdict(self._facts)))

    def add(self, part: Sequence[Named]) -> None:
        """Tokenizes these instances, each with its id, and appends them."""
        if not part:
            return
        groups = [group for _, group in part]
        texts = [text for group in groups for text in (group.instruction, *group.responses)]
        distinct = list(dict.fromkeys(texts))
        found = dict(zip(distinct, self._encoder.tokens(distinct), strict=True))
        names = [name.encode() for name, _ in part]
        labels = [label for group in groups for label in group.labels]
        self._write("tokens", list(itertools.chain.from_iterable(found[text] for text in texts)))
        self._write("labels", labels)
        self._write("selectable", [flag for group in groups for flag in group.selectable])
        self._write("sources", [SOURCES.index(source) for group in groups for source in group.sources])
        self._write("names", list(b"".join(names)))
        self._write_ends("text_ends", [len(found[text]) for text in texts])
        self._write_ends("pair_ends", [len(group.responses) for group in groups])
        self._write_ends("name_ends", [len(name) for name in names])
        old = self._facts
        self._facts = Facts(
            instances=old.instances + len(part),
            pairs=old.pairs + len(labels),
            longest_instruction=max(old.longest_instruction, *(len(found[g.instruction]) for g in groups)),
            longest_response=max(old.longest_response, *(len(found[text]) for g in groups for text in g.responses)),
            lowest=min(old.lowest, *labels),
            highest=max(old.highest, *labels),
            token_type=old.token_type,
        )

    def _write(self, name: str, values: Any) -> None:
        self._files[name].write(np.asarray(values, dtype=self._kinds[name]).tobytes())

    def _write_ends(self, name: str, lengths: Sequence[int]) -> None:
        ends = self._ends[name] + np.cumsum(lengths, dtype=np.uint64)
        self._write(name, ends)
        self._ends[name] = int(ends[-1])


def _build(
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
        (temporary / PROMPTS).open("wb") as prompts,
    ):
        for part in batched(read(source, splits=("train", "validation")), CHUNK):
            prompts.write(np.array([prompt_hash(i.instruction) for i in part], dtype="<u8").tobytes())
            fitted = [(i.instance_id, to_group(i, metric, sources)) for i in part if i.split == "train"]
            checked = [(i.instance_id, to_group(i, metric)) for i in part if i.split == "validation"]
            if any(group.responses for _, group in fitted):
                (temporary / HAS_TRAIN).touch()
            if unit == "row":
                train.add([(name, row) for name, group in fitted for row in split_rows(group)])
            else:
                train.add([(name, group) for name, group in fitted if len(group.responses) > 1])
            validation.add([(name, group) for name, group in checked if any(group.selectable)])
            done += len(part)
            progress(done, unit="instances tokenized")
    rename_folder(temporary, folder, last=PROMPTS)


@contextlib.contextmanager
def _held(cache: Path, key: str) -> Iterator[None]:
    """Holds a lock that falls with the process, however it ends."""
    make_private(cache)
    with hold_lock(cache / f".{key}.lock"):
        yield
