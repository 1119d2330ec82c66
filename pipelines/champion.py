"""Which registered versions a run means, resolved when it is submitted: no cache answers for a moved alias."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cappy.steps import STEP_SPECS
from cappy.worker import read_record
from pipelines.fingerprints import fingerprints

CHAMPION = "champion"


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
