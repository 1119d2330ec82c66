"""Where the measurements of `throughput.py` gather, and its clock."""

import os
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

import torch
from machine import machine
from throughput_texts import round_digits

from cappy.costing import Measurement, Texts
from cappy.costing.costs import CPU, HARDWARE

T = TypeVar("T")


class Bench:
    """Where measurements gather; `note` adds one and says so."""

    def __init__(self, hardware: str, work: Path) -> None:
        self.hardware, self.work = hardware, work
        self.found: list[Measurement] = []
        self.texts: dict[str, tuple[Texts, ...]] = {}

    def note(
        self, step: Any, of: str, unit: Any, value: float, *, hardware: str | None = None, **details: float
    ) -> None:
        """Adds a measurement with today's date, this machine and its load."""
        entry = Measurement(
            step=step, hardware=hardware or self.hardware, of=of, unit=unit, value=round_digits(value),
            date=date.today().isoformat(), machine=machine(), load=round_digits(os.getloadavg()[0]),
            details={name: round_digits(number) for name, number in details.items()},
        )  # fmt: skip
        self.found.append(entry)
        print(f"{step} of {of}: {entry.value:g} {unit} {entry.details}", flush=True)

    def time_call(self, work: Callable[[], T]) -> tuple[float, T]:
        """Seconds that a call took, and what it gave: of a CPU its time, so that other work beside it counts little."""
        clock = time.process_time if self.hardware == CPU else time.perf_counter
        started = clock()
        value = work()
        if self.hardware != CPU:
            torch.cuda.synchronize()
        return clock() - started, value

    def share(self, flops: float) -> dict[str, Any]:
        """The share of the data sheet's peak, where there is one."""
        peak = HARDWARE[self.hardware]
        return {"flop_share": flops / peak} if peak else {}
