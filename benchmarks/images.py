"""Sizes and start times of the container images: python benchmarks/images.py (builds what is not built).

An engine that answers is used, else one is started (docker/engine.py). Start times are those of a container that is
made, runs and ends, its files in the page cache, on a read-only file system. `load` is the number of processes that
wanted the machine's cores in the minute before.
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
    """Bytes and seconds of one image."""
    image = images.tag(name)
    told = docker(environment, "image", "inspect", "--format", "{{.Size}}", image)
    command = ("--version",) if name == "serving" else ("cappy", "--version")
    words = ("run", "--rm", "--network", "none", *LOCKED_DOWN, image, *command)
    found: dict[str, Any] = {"bytes": int(told), "version_seconds": repeat(lambda: docker(environment, *words))}
    if name == "serving":
        found["ready_seconds"] = repeat(lambda: until_ready(environment, image))
    return found


def repeat(action: Callable[[], object]) -> dict[str, float]:
    """Median, least and most of the seconds that an action takes; a first one, which fills caches, is left out."""
    action()
    seconds = []
    for _ in range(REPEATS):
        began = time.monotonic()
        result = action()
        seconds.append(result if isinstance(result, float) else time.monotonic() - began)
    return {"median": statistics.median(seconds), "least": min(seconds), "most": max(seconds)}


def until_ready(environment: Mapping[str, str], image: str) -> float:
    """Seconds from `docker run` to the first 200 of /ready, with the built-in scorer."""
    began = time.monotonic()
    words = ("run", "--detach", "--publish", "127.0.0.1::8080", *LOCKED_DOWN, image, "serve", "--scorer", "builtin")
    container = docker(environment, *words)
    try:
        port = docker(environment, "port", container, "8080").rpartition(":")[2]
        while time.monotonic() - began < 120:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=2):
                    return time.monotonic() - began
            except OSError:
                time.sleep(0.05)
        raise SystemExit(f"benchmarks/images.py: {image} is not ready after two minutes")
    finally:
        docker(environment, "rm", "--force", container)


def docker(environment: Mapping[str, str], *words: str) -> str:
    """What the client prints."""
    done = subprocess.run([engine.find_docker(), *words], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def table(results: Mapping[str, Any]) -> str:
    """The README's table."""
    lines = ["| image | size | `cappy --version` | ready to score |", "|---|---|---|---|"]
    for name, found in results["images"].items():
        ready = f"{found['ready_seconds']['median']:.1f} s" if "ready_seconds" in found else ""
        size, start = found["bytes"] / 1e9, found["version_seconds"]["median"]
        lines.append(f"| `{images.IMAGES[name]}` | {size:.2f} GB | {start:.1f} s | {ready} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
