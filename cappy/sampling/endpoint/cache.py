"""Answers on disk, one small file each, named by everything that determines the answer.

Plain files and renames, because work folders lie on network volumes and mounted buckets too, where a database's locks
cannot be trusted. Any number of processes may share a folder: whoever writes a file writes it whole.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cappy.config import fingerprint
from cappy.records.folder import write_bytes
from cappy.sampling.endpoint.answers import Answer

FORMAT = 2
"""Of what is kept. Answers of 1 include responses that their server had given up (`finish_reason: error`)."""


class Cache:
    """Answers by key; without a folder in memory alone."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._memory: dict[str, Answer] = {}

    def get(self, key: str) -> Answer | None:
        """The answer under this key; None if there is none or its file is damaged."""
        if self._folder is None:
            return self._memory.get(key)
        try:
            values = json.loads(_path(self._folder, key).read_bytes())
            answer = Answer(**{**values, "left_out": tuple(values["left_out"])})
        except (FileNotFoundError, ValueError, TypeError, KeyError):
            return None
        return answer

    def put(self, key: str, answer: Answer) -> None:
        """Keeps an answer for good; FolderError if the disk will not have it."""
        if self._folder is None:
            self._memory[key] = answer
        else:
            write_bytes(_path(self._folder, key), json.dumps(asdict(answer), ensure_ascii=False).encode(), private=True)


def key_of(**determining: Any) -> str:
    """The key of what determines an answer: address, model, api, prompt, every knob, seed, number of the sample."""
    return fingerprint("answer", FORMAT, determining)


def _path(folder: Path, key: str) -> Path:
    return folder / key[:2] / f"{key[2:]}.json"
