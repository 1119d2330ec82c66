"""Recorded samples: responses that an LLM gave earlier, read from a file or a folder of records.

The samples are read once and copied to a temporary file (in memory up to `SPOOL_BYTES`). Memory holds about 100
bytes for each sample and 200 for each prompt, whatever the length of the texts.
"""

import functools
import hashlib
import json
import tempfile
import weakref
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from cappy.errors import ConfigError, FolderError, RecordError, quote
from cappy.records import Candidate, Manifest, read, read_manifest
from cappy.records.folder import MANIFEST, sha256_of
from cappy.sampling.generators import Generator, OnCandidates, ignore_progress
from cappy.sampling.recorded_rows import Sample, read_file, read_folder
from cappy.sampling.strategies import Decoding, decoding_of_name, decodings_of
from cappy.specs import Spec, parse_spec

SPOOL_BYTES = 64 * 2**20
"""Size above which the copy of the samples is a file on disk (in TMPDIR) rather than memory."""
_STORED_FIELDS = ("response", "seed", "status", "logprob_sum", "logprob_mean", "num_tokens")


class Recorded:
    """Answers with recorded samples: sample k of a decoding is the k-th that was recorded for the same prompt.

    Prompts are equal if their text is. Seeds have no effect. A prompt with fewer samples than others gives those that
    it has. `revision` is the sha256 of the file, or the hash of the folder's manifest.
    """

    def __init__(self, spec: Spec) -> None:
        self.name = spec.text
        self._index = _index_of(spec)
        self.revision = self._index.revision
        self._unnamed_model = f"recorded:{Path(spec.name).name}"

    @property
    def decodings(self) -> tuple[Decoding, ...]:
        """The recorded decodings in the order of the file, each with the most samples that a prompt has."""
        return self._index.decodings

    def check(self, decodings: Sequence[Decoding]) -> None:
        """Raises ConfigError for a decoding that is not recorded, or not as often for any prompt."""
        most = self._refuse_unknown(decodings)
        for decoding in decodings:
            if decoding.num_samples > most[decoding.name]:
                raise ConfigError(
                    f"{self.name}: has {most[decoding.name]} samples of {decoding.name}, the strategy asks for "
                    f"{decoding.num_samples}; {self._strategy_remedy()}"
                )

    def sample(
        self,
        instructions: Sequence[str],
        decodings: Sequence[Decoding],
        *,
        seed: int,
        on_candidates: OnCandidates = ignore_progress,
    ) -> list[list[Candidate]]:
        """The recorded candidates of each instruction, one decoding after another.

        Raises ConfigError if an instruction has no samples.
        """
        del seed
        self.check(decodings)
        self._refuse_missing([text for text in instructions if text not in self._index], len(instructions))
        results = []
        for text in instructions:
            candidates = [
                replace(candidate, generator=candidate.generator or self._unnamed_model, revision=self.revision)
                for decoding in decodings
                for candidate in self._index.candidates(text, decoding.name, decoding.num_samples)
            ]
            on_candidates(len(candidates))
            results.append(candidates)
        return results

    def likelihoods(self, pairs: Sequence[tuple[str, str]]) -> None:
        """None: only recorded responses have likelihoods."""

    def take_counts(self) -> Mapping[str, int]:
        """There are no counts."""
        return {}

    def close(self) -> None:
        """Nothing to release: the index of the file is shared within the process."""

    def count(self, instructions: Iterable[str], decodings: Sequence[Decoding]) -> int:
        """The number of candidates that `sample` gives for these instructions."""
        counts = (self._index.counts(text) for text in instructions)
        return sum(min(own.get(one.name, 0), one.num_samples) for own in counts for one in decodings)

    def check_prompts(self, instructions: Iterable[str], decodings: Sequence[Decoding], *, exact: bool) -> list[str]:
        """Checks before a run that there are samples for all instructions; returns cautions.

        Raises ConfigError for instructions without samples, and if `exact` for those with fewer than a decoding asks
        for.
        """
        self._refuse_unknown(decodings)
        missing: list[str] = []
        total = num_missing = 0
        counts_by_name: dict[str, Counter[int]] = {decoding.name: Counter() for decoding in decodings}
        for text in instructions:
            total += 1
            if text not in self._index:
                num_missing += 1
                missing = missing or [text]
                continue
            counts = self._index.counts(text)
            for name, numbers in counts_by_name.items():
                numbers[counts.get(name, 0)] += 1
        self._refuse_missing(missing, total, num_missing)
        cautions = list(self._index.cautions)
        for decoding in decodings:
            numbers = counts_by_name[decoding.name]
            fewer = {count: number for count, number in numbers.items() if count < decoding.num_samples}
            if not fewer:
                continue
            most = f"{max(fewer)} sample{'s' if max(fewer) != 1 else ''}{' or fewer' if len(fewer) > 1 else ''}"
            problem = f"{most} of {decoding.name} for {sum(fewer.values()):,} of {total:,} prompts"
            if exact:
                raise ConfigError(
                    f"{self.name}: has {problem}, the strategy asks for {decoding.num_samples}; "
                    f"{self._strategy_remedy()}"
                )
            cautions.append(f"{self.name}: has {problem}, {decoding.num_samples} for the others")
        return cautions

    def _refuse_unknown(self, decodings: Sequence[Decoding]) -> dict[str, int]:
        """Raises ConfigError for a decoding that is not recorded; returns the most samples of each that is."""
        most = {decoding.name: decoding.num_samples for decoding in self.decodings}
        unknown = next((decoding.name for decoding in decodings if decoding.name not in most), None)
        if unknown is not None:
            raise ConfigError(f"{self.name}: has no samples of {unknown}; {self._strategy_remedy()}")
        return most

    def _refuse_missing(self, missing: Sequence[str], total: int, num_missing: int | None = None) -> None:
        count = len(missing) if num_missing is None else num_missing
        if missing:
            remedy = "record these prompts too, leave their instances out, or give the file that was sampled for them"
            raise ConfigError(
                f"{self.name}: has no samples for {count:,} of {total:,} prompts, such as {quote(missing[0])}; {remedy}"
            )

    def _strategy_remedy(self) -> str:
        contents = ", ".join(f"{decoding.num_samples} of {decoding.name}" for decoding in self.decodings)
        return f"leave --strategy out to get all that it has ({contents}), or ask for less"


def recorded_decodings(spec: Spec) -> tuple[Decoding, ...]:
    """The default strategy of recorded samples: all of them. Raises ConfigError or RecordError like `Recorded`."""
    return _index_of(spec).decodings


def refuse_max_new_tokens(specs: Sequence[str], max_new_tokens: int) -> None:
    """Raises ConfigError for a length limit if all samples are recorded: it would have no effect."""
    if max_new_tokens and specs and all(parse_spec(text).kind == "recorded" for text in specs):
        raise ConfigError(
            f"sampling: --max-new-tokens {max_new_tokens} has no effect on recorded samples; leave it out"
        )


def check_recorded(
    source: Path,
    parent: Manifest,
    generators: Sequence[Generator | None],
    decodings: Sequence[Decoding],
    *,
    exact: bool,
) -> list[str]:
    """Checks before a run that recorded samples fit the instances in `source`; returns cautions.

    Other generators, and None, are skipped.
    Raises ConfigError like `Recorded.check_prompts`, for two generators with the same samples, and if the instances
    hold these samples already.
    """
    cautions: list[str] = []
    names: dict[str, str] = {}
    for position, generator in enumerate(generators):
        if not isinstance(generator, Recorded):
            continue
        if (other := names.setdefault(generator.revision, generator.name)) != generator.name:
            raise ConfigError(f"sampling: {other} and {generator.name} have the same samples; remove one of them")
        own_decodings = decodings_of(decodings, position)
        cautions += generator.check_prompts(
            _sampled_instructions(source, parent, generator), own_decodings, exact=exact
        )
    return cautions


def _sampled_instructions(source: Path, parent: Manifest, generator: Recorded) -> Iterator[str]:
    """The instructions in the folder that are sampled for, those of instances without choices.

    Raises ConfigError for an instance that holds the samples of the generator already.
    """
    is_imported = generator.revision in parent.parents
    for instance in read(source):
        if instance.choices:
            continue
        if any(_is_held(candidate, generator.revision, is_imported) for candidate in instance.candidates):
            remedy = "prepare the instances with --exclude '*' (and --group-responses always for one row per sample)"
            raise ConfigError(
                f"{generator.name}: instance {quote(instance.instance_id)} has its samples already; {remedy}"
            )
        yield instance.instruction


def _is_held(candidate: Candidate, revision: str, is_imported: bool) -> bool:
    return candidate.source == "llm" and (is_imported or candidate.revision == revision)


class _Index:
    """The samples of a file in a temporary file, and the positions of each prompt's samples in it.

    `decodings` are those of the file, `cautions` what is odd about it.
    """

    def __init__(self, name: str, revision: str, samples: Iterable[Sample]) -> None:
        self.revision = revision
        self.cautions: list[str] = []
        self._spool = tempfile.SpooledTemporaryFile(max_size=SPOOL_BYTES)  # noqa: SIM115 # closed with this object
        weakref.finalize(self, self._spool.close)
        self._prompts: dict[bytes, int] = {}
        self._names: dict[str, int] = {}
        self._models: dict[str, int] = {}
        columns = self._read(name, samples)
        if not self._prompts:
            raise RecordError(f"{name}: has no samples; give a file with a prompt and a response in each line")
        order, num_different = self._sort(columns)
        if num_different:
            problem = f"{num_different:,} samples are recorded again with another response"
            self.cautions.append(f"{name}: {problem}; the first of the same prompt, decoding, number and model is used")
        prompts, self._decodings, self._model_ids, _, self._offsets = (column[order] for column in columns)
        self._starts = np.searchsorted(prompts, np.arange(len(self._prompts) + 1))
        self.decodings = tuple(map(decoding_of_name, self._names, self._most_samples(prompts)))

    def __contains__(self, instruction: str) -> bool:
        return _digest(instruction) in self._prompts

    def counts(self, instruction: str) -> dict[str, int]:
        """The number of samples of a prompt by the name of the decoding."""
        numbers = Counter(self._decodings[self._rows(instruction)].tolist())
        return {name: numbers[index] for name, index in self._names.items() if index in numbers}

    def candidates(self, instruction: str, decoding: str, limit: int) -> Iterator[Candidate]:
        """The first `limit` recorded candidates of a prompt and decoding, in the order of their numbers."""
        rows, models = self._rows(instruction), list(self._models)
        for row in rows.start + np.flatnonzero(self._decodings[rows] == self._names[decoding])[:limit]:
            values = json.loads(self._line(self._offsets[row]))
            yield Candidate(**values, generator=models[self._model_ids[row]], decoding=decoding)

    def _rows(self, instruction: str) -> slice:
        prompt = self._prompts[_digest(instruction)]
        return slice(int(self._starts[prompt]), int(self._starts[prompt + 1]))

    def _line(self, offset: int) -> bytes:
        self._spool.seek(offset)
        return self._spool.readline()

    def _read(self, name: str, samples: Iterable[Sample]) -> tuple[np.ndarray, ...]:
        """Copies the samples; returns their prompts, decodings, models, numbers and offsets, (samples,) each."""
        columns = (array("I"), array("I"), array("I"), array("q"), array("Q"))
        where_numbered: dict[bool, str] = {}
        offset = 0
        for sample in samples:
            candidate, number = sample.candidate, sample.number
            where_numbered.setdefault(number is not None, sample.where)
            if len(where_numbered) > 1:
                problem = f"has no number in the field sample, but {where_numbered[True]} has one"
                raise RecordError(f"{where_numbered[False]}: {problem}; number every sample of the file, or none")
            ids = (
                self._prompts.setdefault(_digest(sample.instruction), len(self._prompts)),
                self._names.setdefault(candidate.decoding, len(self._names)),
                self._models.setdefault(candidate.generator, len(self._models)),
            )
            for column, value in zip(columns, (*ids, -1 if number is None else number, offset), strict=True):
                column.append(value)
            line = json.dumps({field: getattr(candidate, field) for field in _STORED_FIELDS}).encode() + b"\n"
            try:
                self._spool.write(line)
            except OSError as error:
                problem = f"cannot hold a copy of {name} ({error.strerror})"
                raise FolderError(f"{tempfile.gettempdir()}: {problem}; free some space, or set TMPDIR") from error
            offset += len(line)
        arrays = tuple(np.array(column) for column in columns)
        return arrays if True in where_numbered else (*arrays[:3], _rank(arrays[:3]), arrays[4])

    def _sort(self, columns: tuple[np.ndarray, ...]) -> tuple[np.ndarray, int]:
        """The order by prompt, decoding and number without repeated samples, and how many repeat another response."""
        prompts, decodings, models, numbers, offsets = columns
        order = np.lexsort((models, numbers, decodings, prompts))  # A stable sort: the first of equal samples is first.
        is_first = np.ones(len(order), dtype=bool)
        is_first[1:] = np.any([np.diff(column[order].astype(np.int64)) for column in columns[:4]], axis=0)
        first_of = order[np.maximum.accumulate(np.where(is_first, np.arange(len(order)), 0))]
        num_different = sum(
            self._line(offsets[row]) != self._line(offsets[first])
            for row, first in zip(order[~is_first], first_of[~is_first], strict=True)
        )
        kept = np.sort(order[is_first])
        return kept[np.lexsort((numbers[kept], decodings[kept], prompts[kept]))], num_different

    def _most_samples(self, prompts: np.ndarray) -> list[int]:
        """The most samples that a prompt has, by decoding."""
        keys, counts = np.unique(prompts.astype(np.int64) * len(self._names) + self._decodings, return_counts=True)
        most = np.zeros(len(self._names), dtype=np.int64)
        np.maximum.at(most, keys % len(self._names), counts)
        return [int(count) for count in most]


def _rank(columns: Sequence[np.ndarray]) -> np.ndarray:
    """The number of each row among the rows with equal values in all columns, from 0, in their order."""
    order = np.lexsort(columns)
    starts = np.ones(len(order), dtype=bool)
    starts[1:] = np.any([np.diff(column[order].astype(np.int64)) for column in columns], axis=0)
    places = np.arange(len(order))
    ranks = np.empty(len(order), dtype=np.int64)
    ranks[order] = places - np.maximum.accumulate(np.where(starts, places, 0))
    return ranks


def _digest(instruction: str) -> bytes:
    return hashlib.blake2b(instruction.encode(), digest_size=16).digest()


def _index_of(spec: Spec) -> _Index:
    path = Path(spec.name)
    file = path / MANIFEST if path.is_dir() else path
    try:
        status = file.stat()
        file.open("rb").close()
    except OSError as error:
        remedy = "give a JSON Lines or Parquet file of samples, or a folder that cappy sampling wrote"
        raise ConfigError(f"{spec.text}: cannot be read ({error.strerror}); {remedy}") from error
    return _load_index(spec.text, path, (status.st_ino, status.st_size, status.st_mtime_ns))


@functools.lru_cache(maxsize=16)
def _load_index(name: str, path: Path, stamp: tuple[int, ...]) -> _Index:
    """The index of a file, which is kept while the file stays the same: a step asks for it several times."""
    if path.is_dir():
        return _Index(name, read_manifest(path).hash, read_folder(path))
    sha256 = sha256_of(path)
    index = _Index(name, sha256, read_file(path))
    if sha256_of(path) != sha256:
        raise FolderError(f"{path}: changed while it was read; run the same command again")
    return index
