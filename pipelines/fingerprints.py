"""What each step of a run will compute, as one hash per step, found when the run is submitted.

An orchestrator's cache keys see strings, not what they point to: with the fingerprint among a step's parameters, an
edited input file, a moved alias or another version of the code is never answered from the cache.
"""

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cappy.config import build, fingerprint, identity
from cappy.keys import work_key
from cappy.records.folder import MANIFEST, describe_files, sha256_of, verify
from cappy.runs import read_record
from cappy.steps import STEP_SPECS
from cappy.worker import config_class


def fingerprints(
    settings: Mapping[str, Mapping[str, Any]],
    *,
    tracking_uri: str = "",
    revision: str = "",
    images: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Step -> digest of the key of its work (`cappy.keys`).

    It holds the versions, the settings, the images and the outside content of this step and all before it.

    `revision` stands for content outside that this machine cannot see, `images` are those of steps that run in one.
    ConfigError if a setting is wrong: it costs milliseconds here and a training run later.
    """
    found: dict[str, str] = {}
    before = revision
    for step, config in configs(settings).items():
        values = settings[step]
        outside = _outside(step, values, tracking_uri)
        image = (images or {}).get(step, "")
        before = found[step] = work_key(step, identity(config), [image, outside, before]).digest
    return found


def configs(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The config of each step, its folders not yet known; ConfigError if a setting is wrong."""
    found: dict[str, Any] = {}
    for step, values in settings.items():
        folders: dict[str, Any] = {name: Path("artifact") for name in STEP_SPECS[step].artifacts}
        if step == "gathering":
            folders["source"] = (Path("artifact"),)
        found[step] = build(config_class(step), {**values, **folders})
    return found


def content(text: str, *, tracking_uri: str = "") -> str:
    """What a spec or path points to at this moment, as a hash; the text itself where it pins what it names."""
    if text == "builtin":
        return _weights()
    if text.startswith("models:/"):
        from cappy.registry import resolve

        return resolve(text, tracking_uri=tracking_uri).manifest_hash
    path = Path(text)
    if path.is_file():
        return _sha256(path.absolute(), path.stat().st_mtime_ns, path.stat().st_size)
    if path.is_dir():
        return _folder(path)
    return text


def named(step: str, values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Setting and path or spec of everything outside that the settings of a step name."""
    from cappy.sampling.strategies import FILES

    for name in STEP_SPECS[step].outside if step in STEP_SPECS else ():
        given = values.get(name) or ()
        for text in (given,) if isinstance(given, str | Path) else given:
            yield name, str(text).removeprefix("vllm:")  # Who runs a folder changes nothing of what it holds.
    if step == "sampling" and str(values.get("strategy", "")).endswith(FILES):
        yield "strategy", values["strategy"]


def _outside(step: str, values: Mapping[str, Any], tracking_uri: str) -> list[list[str]]:
    """Setting, name and content of everything outside; a file's name counts, because preparation names a task by it."""
    found = named(step, values)
    return [[name, Path(text).name, content(text, tracking_uri=tracking_uri)] for name, text in found]


def _folder(path: Path) -> str:
    if (path / MANIFEST).is_file():
        # Verified, or an edited part under its old manifest would be answered from the cache.
        return verify(path).hash
    return fingerprint([[file.name, file.sha256] for file in describe_files(path)])


@functools.cache
def _sha256(path: Path, changed: int, size: int) -> str:
    """A big file is read once, although two fingerprints ask for it; `changed` and `size` tell another content."""
    return sha256_of(path)


@functools.cache
def _weights() -> str:
    from cappy import builtin

    folder = Path(builtin.__file__).parent / "weights"
    return fingerprint([[file.name, file.sha256] for file in describe_files(folder)])


def resolved(
    settings: Mapping[str, Mapping[str, Any]], *, work: Path, tracking_uri: str = "", **pinned: Any
) -> dict[str, dict[str, Any]]:
    """The settings with every `models:/name@alias` as `models:/name/number`, and the champion to compare with.

    `pinned` is what else goes into the fingerprints.
    """
    found = {step: {**values, **_numbered(step, values, tracking_uri)} for step, values in settings.items()}
    if "promotion" in found and not found["evaluation"].get("champion"):
        found["evaluation"]["champion"] = _champion(found, work, tracking_uri, pinned)
    return found


def _numbered(step: str, values: Mapping[str, Any], tracking_uri: str) -> dict[str, Any]:
    from cappy.registry import resolve

    return {
        name: resolve(values[name], tracking_uri=tracking_uri).uri
        for name in STEP_SPECS[step].outside
        if isinstance(values.get(name), str) and values[name].startswith("models:/")
    }


def _champion(
    settings: Mapping[str, Mapping[str, Any]], work: Path, tracking_uri: str, pinned: Mapping[str, Any]
) -> str:
    """The version that evaluation compares with; empty if there is none.

    A champion that this very finetuning made is not compared with itself but with its predecessor, as it was when it
    was promoted: so a second identical run is answered wholly from the cache.
    """
    from cappy.registry import champion

    name = settings["registration"].get("name", "cappy")
    present = champion(name, tracking_uri=tracking_uri)
    if present is None:
        return ""
    until = list(settings)[: list(settings).index("finetuning") + 1]
    found = fingerprints({step: settings[step] for step in until}, tracking_uri=tracking_uri, **pinned)
    record = read_record(work, found["finetuning"])
    if record is not None and record.manifest_hash == present.manifest_hash:
        return f"models:/{name}/{present.former}" if present.former else ""
    return present.uri
