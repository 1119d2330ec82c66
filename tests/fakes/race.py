"""A promotion in a process of its own, started together with another."""

from pathlib import Path
from typing import Any


def promote(start: Any, version: str, report: str, uri: str, target: str) -> None:
    """Waits for the other, then promotes."""
    from cappy.registry.promotion import PromotionConfig, run

    start.wait(60)
    work = Path(target).parent / f"work-{Path(target).name}"
    run(PromotionConfig(version=version, report=report, target=target, tracking_uri=uri, work=work))  # type: ignore[arg-type]
