"""Sizes and start times of the container images: python benchmarks/images.py (builds missing images).

Uses a running Docker engine or starts one (docker/engine.py). A start time is that of creating, running and removing a
container with a read-only file system, with its files in the page cache. `load` is the load average of the minute
before.
"""

import datetime
import json
import os
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docker")]

import engine  # noqa: E402
import images  # noqa: E402
from machine import machine  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "images.json"
REPEATS = 5
LOCKED_DOWN = ("--read-only", "--tmpfs", "/tmp")


def main() -> None:
    """Measures and writes the results."""
    with engine.engine() as environment:
        images.build(list(images.IMAGES), environment)
        results = {
            "benchmark": "images",
            "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
            "machine": machine(),
            "load": os.getloadavg()[0],
            "torch": os.environ.get("TORCH", "cpu"),
            "images": {name: measure(name, environment) for name in images.IMAGES},
        }
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        print(table(results))


def measure(name: str, environment: Mapping[str, str]) -> dict[str, Any]:
    """Size in bytes and start times in seconds of one image."""
    image = images.tag(name)
    size = run_docker(environment, "image", "inspect", "--format", "{{.Size}}", image)
    command = ("--version",) if name == "serving" else ("cappy", "--version")
    arguments = ("run", "--rm", "--network", "none", *LOCKED_DOWN, image, *command)
    measurements: dict[str, Any] = {
        "bytes": int(size),
        "version_seconds": time_repeatedly(lambda: run_docker(environment, *arguments)),
    }
    if name == "serving":
        measurements["ready_seconds"] = time_repeatedly(lambda: time_until_ready(environment, image))
    return measurements


def time_repeatedly(action: Callable[[], object]) -> dict[str, float]:
    """Median, minimum and maximum of the seconds of an action, after a first one that fills caches."""
    action()
    seconds = []
    for _ in range(REPEATS):
        started = time.monotonic()
        result = action()
        seconds.append(result if isinstance(result, float) else time.monotonic() - started)
    return {"median": statistics.median(seconds), "least": min(seconds), "most": max(seconds)}


def time_until_ready(environment: Mapping[str, str], image: str) -> float:
    """Seconds from `docker run` to the first status 200 of /ready, with the built-in scorer."""
    started = time.monotonic()
    arguments = (
        "run",
        "--detach",
        "--publish",
        "127.0.0.1::8080",
        *LOCKED_DOWN,
        image,
        "serve",
        "--scorer",
        "builtin:tiny",
    )
    container = run_docker(environment, *arguments)
    try:
        port = run_docker(environment, "port", container, "8080").rpartition(":")[2]
        while time.monotonic() - started < 120:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=2):
                    return time.monotonic() - started
            except OSError:
                time.sleep(0.05)
        raise SystemExit(f"benchmarks/images.py: {image} is not ready after two minutes")
    finally:
        run_docker(environment, "rm", "--force", container)


def run_docker(environment: Mapping[str, str], *arguments: str) -> str:
    """Runs the Docker client and returns its output."""
    process = subprocess.run(
        [engine.find_docker(), *arguments], env=environment, capture_output=True, text=True, check=True
    )
    return process.stdout.strip()


def table(results: Mapping[str, Any]) -> str:
    """The README's table."""
    lines = ["| image | size | `cappy --version` | ready to score |", "|---|---|---|---|"]
    for name, image in results["images"].items():
        ready = f"{image['ready_seconds']['median']:.1f} s" if "ready_seconds" in image else ""
        size, start = image["bytes"] / 1e9, image["version_seconds"]["median"]
        lines.append(f"| `{images.IMAGES[name]}` | {size:.2f} GB | {start:.1f} s | {ready} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
