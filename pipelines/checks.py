"""Checks what a run on this machine needs before its first step: nothing is written, and no request is paid for.

All problems are shown together. What a step itself checks within seconds of its start, before anything is paid for, is
left to it: every row of the source, for example, is checked by preparation.
"""

import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cappy.errors import CappyError, ConfigError, FolderError, Problems
from cappy.runs import read_record
from cappy.worker import StepConfig
from pipelines.planning import check_references, settings_of, work_of
from pipelines.preview import estimate_sampling
from pipelines.recipe import Platform, Recipe
from pipelines.submission import configs, fingerprints, refuse_artifacts

if TYPE_CHECKING:
    from cappy.preparation.step import PreparationConfig
    from cappy.sampling.step import SamplingConfig

Check = Callable[[], int]
"""A check that raises a CappyError, or returns the bytes that the run would download."""
SCORER_SETTINGS = {"finetuning": "scorer", "evaluation": "scorer", "scoring": "scorer", "pretraining": "encoder"}
"""Step -> the setting that names the scorer or the encoder that it reads."""
DATA_COPIES = 3
"""Copies of the source that a run writes: prepared, sampled, annotated."""
WEIGHT_COPIES = 6
"""Copies of a scorer's weights that training writes: last, best, two moments of the optimizer, result, registry."""
MIN_FREE_BYTES = 100_000_000


def check(recipe: Recipe, platform: Platform = "local") -> None:
    """Raises ConfigError if the run cannot work as far as a few seconds show; ProblemsError for several problems.

    Checks the settings of every step, files, generators, scorers, MLflow and the disk.
    """
    settings = settings_of(recipe, platform)
    problems = Problems()
    with problems.collect():
        refuse_artifacts(recipe.pipeline, recipe.settings)
    configs_by_step: dict[str, StepConfig] = {}
    work = work_of(recipe, platform)
    for step in recipe.steps:
        with problems.collect():
            configs_by_step |= configs({step: {**settings.get(step, {}), "work": str(work)}})
    checks = [
        *_source_checks(configs_by_step, settings),
        *_generator_checks(recipe, configs_by_step, settings, work, platform),
        *_scorer_checks(settings, _tracking_uri(recipe, settings)),
    ]
    with problems.collect():
        check_references(settings)
    downloads = 0
    # Together, because each may wait for a server.
    with ThreadPoolExecutor(max_workers=max(1, len(checks))) as pool:
        for future in [pool.submit(check) for check in checks]:
            with problems.collect():
                downloads += future.result()
    with problems.collect():
        _check_disk(settings, work, downloads)
    problems.raise_all()


def _tracking_uri(recipe: Recipe, settings: Mapping[str, Mapping[str, object]]) -> str:
    """MLflow's address, as `submission.prepare` chooses it."""
    return str(settings.get("registration", {}).get("tracking_uri", "")) or recipe.tracking_uri


def _source_checks(
    configs_by_step: Mapping[str, StepConfig], settings: Mapping[str, Mapping[str, object]]
) -> Iterator[Check]:
    from cappy.preparation.step import PreparationConfig

    config = configs_by_step.get("preparation")
    if isinstance(config, PreparationConfig):
        needs_responses = "sampling" in settings and not settings["sampling"].get("generator")
        yield partial(_check_source, config, needs_responses=needs_responses)


def _check_source(config: "PreparationConfig", *, needs_responses: bool) -> int:
    """Reads the first row of a source on this machine; of a dataset of the hub only the revision is looked up."""
    from cappy.preparation.config import BUILTIN
    from cappy.preparation.sources import open_source

    if config.mixture or config.source == BUILTIN or _is_missing(config.source):
        return 0
    source = open_source(config)
    if source.datasets or source.format == "hub":
        return 0
    first = next(source.rows(), None)
    if first is None:
        raise ConfigError(f"preparation: {config.source}: has no rows; give a file with rows")
    if needs_responses and not first.instance.candidates and not first.instance.choices:
        raise ConfigError(
            f"sampling: {first.where} has no responses; give an LLM: --generator, or parameters.generator in a recipe"
        )
    return 0


def _is_missing(text: str) -> bool:
    """Whether a path does not exist, which `check_references` reports."""
    path = text.removeprefix("vllm:").removeprefix("recorded:")
    return path != "builtin" and ":" not in path and not Path(path).exists()


def _generator_checks(
    recipe: Recipe,
    configs_by_step: Mapping[str, StepConfig],
    settings: Mapping[str, Mapping[str, object]],
    work: Path,
    platform: Platform,
) -> Iterator[Check]:
    from cappy.sampling import check_generator
    from cappy.sampling.generators import EndpointConfig
    from cappy.sampling.step import SamplingConfig
    from cappy.specs import parse_spec

    config = configs_by_step.get("sampling")
    if not isinstance(config, SamplingConfig):  # A setting is invalid: the generators are checked without it.
        specs = settings.get("sampling", {}).get("generator")
        for text in specs if isinstance(specs, Sequence) and not isinstance(specs, str) else ():
            if not _is_missing(str(text)):
                yield partial(check_generator, str(text), EndpointConfig())
        return
    for position, text in enumerate(config.generator):
        # vLLM is in the containers, not here.
        if _is_missing(text) or (platform == "docker" and text.startswith("vllm:")):
            continue
        is_endpoint = parse_spec(text).kind == "openai"
        needs_requests = partial(_needs_requests, recipe, configs_by_step, settings, work, text)
        yield partial(_check_generator, position, config, needs_requests if is_endpoint else None)


def _check_generator(position: int, config: "SamplingConfig", needs_requests: Callable[[], bool] | None) -> int:
    from cappy.sampling import check_generator
    from cappy.sampling.step import endpoint_config
    from cappy.sampling.strategies import decodings_of

    try:
        # The decodings of recorded samples are in their file.
        decodings = decodings_of(config.decodings, position)
        return check_generator(config.generator[position], endpoint_config(config), decodings)
    except ConfigError:
        if needs_requests is not None and not needs_requests():
            return 0  # The results of earlier runs are used, without the endpoint.
        raise


def _needs_requests(
    recipe: Recipe,
    configs_by_step: Mapping[str, StepConfig],
    settings: Mapping[str, Mapping[str, object]],
    work: Path,
    generator: str,
) -> bool:
    """Whether sampling would send a request to this generator: neither its result nor all answers are stored."""
    steps = ("preparation", "sampling")
    try:
        own_settings = {step: {**settings[step], "work": str(work.absolute())} for step in steps}
        digests = fingerprints(own_settings, revision=recipe.revision)
    except CappyError:
        return True
    record = read_record(work, digests["sampling"])
    if recipe.shards == 1 and record is not None and record.status == "done":
        return False
    try:
        estimates = estimate_sampling(configs_by_step)
    except CappyError:
        return True
    return estimates is None or any(each.requests for each in estimates if each.generator == generator)


def _scorer_checks(settings: Mapping[str, Mapping[str, object]], tracking_uri: str) -> Iterator[Check]:
    """The checks of scorers that a step reads, and one of MLflow and the versions in it."""
    texts = [
        str(values[name])
        for step, name in (*SCORER_SETTINGS.items(), ("evaluation", "champion"), ("evaluation", "initial"))
        if (values := settings.get(step, {})).get(name)
    ]

    def check_registry() -> int:
        from cappy.registry import check_tracking, resolve
        from cappy.registry.models import no_database_yet, tracking_address

        check_tracking(tracking_uri)
        for text in texts:
            if not text.startswith("models:/"):
                continue
            if no_database_yet(tracking_uri):
                raise ConfigError(f"{text}: {tracking_address(tracking_uri)} has no versions yet; register one first")
            resolve(text, tracking_uri=tracking_uri)
        return 0

    for text in dict.fromkeys(texts):
        if not _is_missing(text):
            yield partial(_check_scorer, text)
    yield check_registry


def _check_scorer(text: str) -> int:
    """Checks what `cappy.scorers.check_scorer` does, and that it is a scorer or an encoder with a tokenizer."""
    from cappy.hub_client import config_folder
    from cappy.model_folder import ModelFolder
    from cappy.scorers import check_scorer
    from cappy.specs import parse_spec

    downloads = check_scorer(text)
    spec = parse_spec(text)
    if spec.kind in ("path", "hub"):
        from cappy.scoring.model import is_encoder, require_tokenizer

        path = Path(spec.name) if spec.kind == "path" else config_folder(spec)
        folder = ModelFolder(path=path, hash="", has_manifest=False)  # Only described here, not loaded.
        is_encoder(folder, folder.config())
        if spec.kind == "path":
            require_tokenizer(path)
    return downloads


def _check_disk(settings: Mapping[str, Mapping[str, object]], work: Path, downloads: int) -> None:
    """Raises FolderError if the disk of the work folder, or that of the hub's cache, has clearly too little space."""
    needs: dict[Path, int] = defaultdict(int)
    needs[_existing_parent(work)] += MIN_FREE_BYTES + _bytes_written(settings)
    if downloads:
        from huggingface_hub.constants import HF_HUB_CACHE

        needs[_existing_parent(Path(HF_HUB_CACHE))] += downloads
    by_device: dict[int, list[tuple[Path, int]]] = defaultdict(list)
    for folder, need in needs.items():
        by_device[folder.stat().st_dev].append((folder, need))
    for entries in by_device.values():
        folder, need = entries[0][0], sum(need for _, need in entries)
        free = free_bytes(folder)
        if free < need:
            amounts = f"{free / 1e9:,.1f} GB free, but the run writes about {need / 1e9:,.1f} GB"
            raise FolderError(f"disk: {folder} has {amounts}; free some space, or choose another --work")


def free_bytes(folder: Path) -> int:
    """Free bytes of the disk of a folder."""
    return shutil.disk_usage(folder).free


def _existing_parent(path: Path) -> Path:
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())


def _bytes_written(settings: Mapping[str, Mapping[str, object]]) -> int:
    """A low estimate of the bytes that the steps write, from the sizes of the source and of the scorer's weights."""
    source = Path(str(settings.get("preparation", {}).get("source", "")))
    size = source.stat().st_size if source.is_file() else _folder_bytes(source, "*")
    weights = 0
    for step in ("finetuning", "pretraining"):
        name = settings.get(step, {}).get(SCORER_SETTINGS[step])
        weights += _folder_bytes(Path(str(name)), "*.safetensors") if name else 0
    return DATA_COPIES * size + WEIGHT_COPIES * weights


def _folder_bytes(folder: Path, pattern: str) -> int:
    if not folder.is_dir():
        return 0
    return sum(path.stat().st_size for path in folder.rglob(pattern) if path.is_file())
