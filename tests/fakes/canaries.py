"""Canaries: a known value in every variable that has a secret, and the search for them in what a command leaves."""

import base64
import contextlib
import html
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import pyarrow.parquet as pq

CANARIES = {
    name: f"canary-{number:02}-{name[::-1].lower()}"
    for number, name in enumerate(
        (
            *("OPENAI_API_KEY", "CAPPY_WEBHOOK_SECRET", "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD"),
            *("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AZURE_CLIENT_SECRET", "AZURE_STORAGE_ACCESS_KEY"),
            *("GOOGLE_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "KUBE_TOKEN", "SOME_LLM_KEY"),
        )
    )
}
IN_OTHERS = ("canary-of-keys-1", "canary-of-keys-2", "canary-of-headers", "canary-of-a-proxy", "canary-of-database")
OF_MLFLOW = "canary-of/mlflow"
"""In its address, so percent-encoded there."""
EVERY = (*CANARIES.values(), *IN_OTHERS, OF_MLFLOW)
VARIABLES = {
    **{name: f"{value}\n" if name.startswith("MLFLOW") else value for name, value in CANARIES.items()},
    "CAPPY_API_KEYS": f"{IN_OTHERS[0]},{IN_OTHERS[1]}",
    "OTEL_EXPORTER_OTLP_HEADERS": f"authorization=Bearer%20{IN_OTHERS[2]}",
    "HTTPS_PROXY": f"http://me:{IN_OTHERS[3]}@127.0.0.1:9",
    "DATABASE_URL": f"postgresql://me:{IN_OTHERS[4]}@127.0.0.1:9/db",
    "MLFLOW_TRACKING_USERNAME": "anna",
    "NO_PROXY": "127.0.0.1,localhost",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}


def forms(canary: str) -> set[bytes]:
    """What a canary may look like: plain, percent-encoded, in base64 alone and as a password, as JSON and HTML."""
    plain = canary.encode()
    pairs = (f"{user}:{canary}".encode() for user in ("anna", "me"))
    encoded = {base64.b64encode(data).rstrip(b"=") for data in (plain, *pairs)}
    return {plain, quote(canary, safe="").encode(), html.escape(canary).encode(), *encoded}


def canaries_in(data: bytes) -> list[str]:
    return [canary for canary in EVERY if any(form in data for form in forms(canary))]


def content(path: Path) -> bytes:
    """What a file holds, tables as their values."""
    data = path.read_bytes()
    return data + repr(pq.read_table(path).to_pylist()).encode() if path.suffix == ".parquet" else data


def search(folder: Path) -> dict[str, list[str]]:
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    names = {str(path): canaries_in(str(path).encode()) + canaries_in(content(path)) for path in files}
    return {name: result for name, result in names.items() if result}


@dataclass
class Watched:
    """A finished command, and the words of every process beneath it."""

    done: subprocess.CompletedProcess[str]
    words: set[bytes]


def watched(command: list[str], folder: Path, environment: Mapping[str, str]) -> Watched:
    """Runs a command; a thread reads the process list meanwhile.

    A child that has not replaced its program yet still has the command's own words, which are left out.
    """
    words: set[bytes] = set()
    own_words = b"".join(word.encode() + b"\0" for word in command)
    with (folder / "stdout").open("w+") as out, (folder / "stderr").open("w+") as err:
        process = subprocess.Popen(command, cwd=folder, env=dict(environment), stdout=out, stderr=err)

        def look() -> None:
            while process.poll() is None:
                words.update(set(_words_beneath(process.pid)) - {own_words})
                time.sleep(0.05)

        thread = threading.Thread(target=look)
        thread.start()
        process.wait()
        thread.join()
    written = ((folder / name).read_text() for name in ("stdout", "stderr"))
    return Watched(subprocess.CompletedProcess(command, process.returncode, *written), words)


def _words_beneath(top: int) -> Iterator[bytes]:
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    for pid in parents:
        above = parents[pid]
        while above not in (0, 1, top):
            above = parents.get(above, 0)
        if above == top:
            with contextlib.suppress(OSError):
                yield Path(f"/proc/{pid}/cmdline").read_bytes()


COMMAND = [sys.executable, "-c", "from cappy.cli import main; main()"]


def asking(url: str) -> list[str]:
    return ["--generator", f"openai:m@{url}", "--strategy", "endpoint8"]


def adapt(url: str, *more: str) -> list[str]:
    settings = ["finetuning.epochs=0.1", "sampling.max_retries=1"]
    flags = [word for setting in settings for word in ("--set", setting)]
    return [*COMMAND, "adapt", "--instances", "tasks.jsonl", *asking(url), *flags, *more]


def tasks(folder: Path) -> None:
    rows = [f'{{"instruction": "Say word {i}.", "references": ["SAY WORD {i}. once"]}}' for i in range(60)]
    (folder / "tasks.jsonl").write_text("\n".join(rows) + "\n")


def environment() -> dict[str, str]:
    return {**os.environ, **VARIABLES}
