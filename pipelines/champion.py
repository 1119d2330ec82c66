"""Which registered versions a run means, resolved when it is submitted: no cache answers for a moved alias."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cappy.steps import read_record
from pipelines.fingerprints import SPECS, fingerprints

CHAMPION = "champion"


def resolved(settings: Mapping[str, Mapping[str, Any]], *, work: Path) -> dict[str, dict[str, Any]]:
    """The settings with every `models:/name@alias` as `models:/name/number`, and the champion to compare with."""
    found = {step: {**values, **_numbered(step, values, settings)} for step, values in settings.items()}
    if "promotion" in found and not found["evaluation"].get("champion"):
        found["evaluation"]["champion"] = _champion(found, work)
    return found


def _numbered(step: str, values: Mapping[str, Any], settings: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    from cappy.registry import resolve

    uri = tracking_uri(settings)
    return {
        name: resolve(values[name], tracking_uri=uri).uri
        for name in SPECS.get(step, ())
        if isinstance(values.get(name), str) and values[name].startswith("models:/")
    }


def _champion(settings: Mapping[str, Mapping[str, Any]], work: Path) -> str:
    """The version that evaluation compares with; empty if there is none.

    A champion that this very finetuning made is not compared with itself but with its predecessor, as it was when it
    was promoted: so a second identical run is answered wholly from the cache.
    """
    from cappy.registry import champion

    name = settings["registration"].get("name", "cappy")
    present = champion(name, tracking_uri=tracking_uri(settings))
    if present is None:
        return ""
    until = ("preparation", "sampling", "annotation", "finetuning")
    found = fingerprints({step: settings[step] for step in until}, tracking_uri=tracking_uri(settings))
    record = read_record(work, found["finetuning"])
    if record is not None and record.manifest_hash == present.manifest_hash:
        return f"models:/{name}/{present.former}" if present.former else ""
    return present.uri


def tracking_uri(settings: Mapping[str, Mapping[str, Any]]) -> str:
    """MLflow's address as the registration step will use it."""
    return str(settings["registration"].get("tracking_uri", ""))
