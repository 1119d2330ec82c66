"""The record that every step reads and writes, and the folders that contain it."""

from cappy.records.folder import File, Manifest, read_manifest, write
from cappy.records.instance import Candidate, Instance, Split, prompt_hash
from cappy.records.reading import read, read_batches

__all__ = [
    "Candidate",
    "File",
    "Instance",
    "Manifest",
    "Split",
    "prompt_hash",
    "read",
    "read_batches",
    "read_manifest",
    "write",
]
