"""Collects and times the measurements of `throughput.py`."""

import os
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

import torch
from machine import machine
from throughput_texts import round_digits

from cappy.costing import Measurement, TextLengths
from cappy.costing.costs import CPU, HARDWARE

T = TypeVar("T")


class Bench:
    """Collects measurements; `record` adds one and prints it."""

    def __init__(self, hardware: str, work: Path) -> None:
        self.hardware, self.work = hardware, work
        self.measurements: list[Measurement] = []
        self.texts: dict[str, tuple[TextLengths, ...]] = {}

    def record(
        self, step: Any, subject: str, unit: Any, value: float, *, hardware: str | None = None, **details: float
    ) -> None:
        """Adds a measurement with today's date, this machine and its load."""
        entry = Measurement(
            step=step, hardware=hardware or self.hardware, subject=subject, unit=unit, value=round_digits(value),
            date=date.today().isoformat(), machine=machine(), load=round_digits(os.getloadavg()[0]),
            details={name: round_digits(number) for name, number in details.items()},
        )  # fmt: skip
        self.measurements.append(entry)
        print(f"{step} of {subject}: {entry.value:g} {unit} {entry.details}", flush=True)

    def time_call(self, work: Callable[[], T]) -> tuple[float, T]:
        """Seconds of a call, and its result; on a CPU these are CPU seconds, which depend less on other work."""
        clock = time.process_time if self.hardware == CPU else time.perf_counter
        started = clock()
        value = work()
        if self.hardware != CPU:
            torch.cuda.synchronize()
        return clock() - started, value

    def share(self, flops: float) -> dict[str, Any]:
        """`flop_share`, the share of the hardware's peak FLOP/s, if the peak is known."""
        peak = HARDWARE[self.hardware]
        return {"flop_share": flops / peak} if peak else {}
