"""Calibrations that are straight lines."""

from collections.abc import Mapping

from cappy.scoring.calibration import Calibration, PickMap


def straight(tops: Mapping[int, float], *, low: float = 0.0, score: float = 1.0) -> Calibration:
    """Of scores from 0 to `score` a label from `low` to that of n in `tops` is expected."""
    maps = tuple(PickMap(n, (0.0, score), (low, top)) for n, top in tops.items())
    return Calibration(maps, metric="rougeL", fitted_on=80)
