"""The scorer: a folder that transformers loads, and the object that scores."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from cappy.errors import ConfigError, FolderError, shown
from cappy.records.folder import MANIFEST, Manifest, describe_files, read_manifest, write_manifest
from cappy.scoring.encoding import Encoded, Pair, PairEncoder
from cappy.specs import scorer_folder

Head = Literal["mse", "bce"]
HEADS: tuple[Head, ...] = get_args(Head)

MAX_LENGTH = 512
BATCH_TOKENS = 4096
CHUNK_PAIRS = 4096
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt", "*.npy", "*.joblib", "*.msgpack")

# The activation is recorded where sentence-transformers, vLLM and we look for it, so that one folder gives one number.
_ACTIVATIONS: Mapping[Head, str] = {
    "mse": "torch.nn.modules.linear.Identity",
    "bce": "torch.nn.modules.activation.Sigmoid",
}


@dataclass(frozen=True, slots=True)
class Selection:
    """The pick among responses: its index, its text, and the scores of all in their order."""

    index: int
    response: str
    scores: tuple[float, ...]


class Scorer:
    """Scores how correct a response is for an instruction.

    The head `bce` gives 0 to 1 (a sigmoid over soft labels); `mse` is the published raw regression, never clipped,
    because clipping makes ties: it may leave 0 to 1 a little. Head and activation run in fp32. A score does not depend
    on the other pairs of the call (1e-4 in fp32). A pair's response is never truncated as long as it fits alone.
    """

    def __init__(self, model: Any, tokenizer: Any, *, head: Head, max_length: int, version: str = "") -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.head = head
        self.version = version
        self.encoder = PairEncoder(tokenizer, max_length)
        self.device = next(model.parameters()).device

    @classmethod
    def load(cls, spec: str, *, device: str | None = None) -> "Scorer":
        """The scorer that a spec names, its files verified; FolderError where a pickle lies among them."""
        folder = scorer_folder(spec)
        refuse_pickles(folder)
        disable_progress_bar()
        config = AutoConfig.from_pretrained(folder)
        if getattr(config, "auto_map", None):
            raise FolderError(
                f"{folder}: its config.json asks for remote code (auto_map); it is not run, remove the entry"
            )
        if config.num_labels != 1:
            raise FolderError(f"{folder}: has {config.num_labels} labels; a scorer has one")
        if not any(folder.glob("*.safetensors")):
            raise FolderError(f"{folder}: holds no model.safetensors; save the model with safe_serialization=True")
        model, found = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
        if missing := sorted(found["missing_keys"]):
            what = "is an encoder, not a scorer: its weights have no" if "classifier" in missing[0] else "lacks"
            raise FolderError(f"{folder}: {what} {missing[0]}; make a scorer of it first (cappy pretraining --encoder)")
        model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        version = read_manifest(folder).hash[:12] if (folder / MANIFEST).exists() else ""
        return cls(model, tokenizer, head=head_of(config), max_length=_max_length(config), version=version)

    def score(self, pairs: Sequence[Pair]) -> list[float]:
        """One score per (instruction, response), in their order; equal pairs are scored once."""
        distinct = list(dict.fromkeys(pairs))
        encoded = self.encoder.encode(distinct)
        scores = [0.0] * len(distinct)
        for batch in by_length(encoded, BATCH_TOKENS):
            values = self.decode(self.forward([encoded[index] for index in batch]))
            for index, value in zip(batch, values, strict=True):
                scores[index] = value
        found = dict(zip(distinct, scores, strict=True))
        return [found[pair] for pair in pairs]

    def score_stream(self, pairs: Iterable[Pair]) -> Iterator[float]:
        """Scores of a stream of any length, in order, with constant memory."""
        iterator = iter(pairs)
        while chunk := list(islice(iterator, CHUNK_PAIRS)):
            yield from self.score(chunk)

    def rank(self, instruction: str, responses: Sequence[str]) -> list[tuple[int, float]]:
        """(index, score) of the responses, best first; of equal scores the earlier response stands first."""
        scores = self.score([(instruction, response) for response in responses])
        return sorted(enumerate(scores), key=lambda ranked: -ranked[1])

    def select(self, instruction: str, responses: Sequence[str]) -> Selection:
        """The best response; the first of equally good ones. ConfigError if there is none to choose from."""
        if not responses:
            raise ConfigError("select: no response to choose from; give at least one")
        scores = self.score([(instruction, response) for response in responses])
        index = max(range(len(scores)), key=lambda i: (scores[i], -i))
        return Selection(index=index, response=responses[index], scores=tuple(scores))

    @torch.inference_mode()
    def forward(self, batch: Sequence[Encoded]) -> Tensor:
        """Logits (pairs,) in fp32, on the model's device."""
        logits: Tensor = self.logits(batch)
        return logits

    def logits(self, batch: Sequence[Encoded]) -> Tensor:
        """As `forward`, with gradients: training sees what scoring sees."""
        inputs = collate(batch, pad=self.tokenizer.pad_token_id, types=self._has_types, device=self.device)
        logits: Tensor = self.model(**inputs).logits
        return logits.float().squeeze(-1)

    def activate(self, logits: Tensor) -> Tensor:
        """Scores from logits: the sigmoid of a `bce` head, the identity of an `mse` head."""
        return logits.sigmoid() if self.head == "bce" else logits

    def decode(self, logits: Tensor) -> list[float]:
        """Scores as floats, in order."""
        values: list[float] = self.activate(logits.float()).tolist()
        return values

    @property
    def _has_types(self) -> bool:
        return (getattr(self.model.config, "type_vocab_size", 0) or 0) > 1

    def write(self, folder: Path) -> None:
        """Writes weights (safetensors), configuration and tokenizer, without a manifest."""
        folder.mkdir(parents=True, exist_ok=True)
        mark_head(self.model.config, self.head, self.encoder.max_length)
        disable_progress_bar()
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def save(self, folder: str | Path) -> Manifest:
        """Writes a finished scorer folder."""
        self.write(Path(folder))
        manifest = Manifest(step="save", files=describe_files(Path(folder)))
        write_manifest(Path(folder), manifest)
        return manifest


def by_length(encoded: Sequence[Encoded], budget: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, longest first, padded tokens within `budget` (or a single pair)."""
    batch: list[int] = []
    for index in sorted(range(len(encoded)), key=lambda i: -len(encoded[i].ids)):
        if batch and (len(batch) + 1) * len(encoded[batch[0]].ids) > budget:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def collate(batch: Sequence[Encoded], *, pad: int, types: bool, device: torch.device) -> dict[str, Tensor]:
    """Right-padded inputs (pairs, longest): ids, mask and, where the model knows them, token types."""
    longest = max(len(pair.ids) for pair in batch)
    padding = [longest - len(pair.ids) for pair in batch]
    inputs = {
        "input_ids": torch.tensor([[*pair.ids, *(pad,) * short] for pair, short in zip(batch, padding, strict=True)]),
        "attention_mask": torch.tensor(
            [[1] * len(pair.ids) + [0] * short for pair, short in zip(batch, padding, strict=True)]
        ),
    }
    if types:
        inputs["token_type_ids"] = torch.tensor(
            [[*pair.types, *(0,) * short] for pair, short in zip(batch, padding, strict=True)]
        )
    return {name: value.to(device) for name, value in inputs.items()}


def head_of(config: Any) -> Head:
    """The head that a folder's configuration states; the published scorer states none and is `mse`."""
    recorded = (getattr(config, "cappy", None) or {}).get("head")
    for head in HEADS:
        if head == recorded:
            return head
    activation = (getattr(config, "sentence_transformers", None) or {}).get("activation_fn", "")
    return "bce" if activation.endswith("Sigmoid") else "mse"


def mark_head(config: Any, head: Head, max_length: int) -> None:
    """Records head, activation and length in a configuration."""
    config.cappy = {"head": head, "max_length": max_length}
    config.sentence_transformers = {"activation_fn": _ACTIVATIONS[head]}
    # What makes transformers' own text-classification pipeline apply the identity, or the sigmoid.
    config.problem_type = "regression" if head == "mse" else "multi_label_classification"


def refuse_pickles(folder: Path) -> None:
    """FolderError where a file of the folder could run code when it is loaded."""
    for pattern in PICKLES:
        for path in sorted(folder.rglob(pattern)):
            remedy = "convert it to safetensors once, then delete it"
            raise FolderError(f"{path}: is a format that can run code when loaded; {remedy}")


def _max_length(config: Any) -> int:
    """The recorded length, else what the positions allow (RoBERTa keeps two of them for itself), at most 512."""
    recorded = (getattr(config, "cappy", None) or {}).get("max_length")
    if recorded is not None and (not isinstance(recorded, int) or recorded < 8):
        raise FolderError(f"config.json: cappy.max_length must be at least 8 tokens, got {shown(json.dumps(recorded))}")
    positions = getattr(config, "max_position_embeddings", None) or MAX_LENGTH + 2
    reserved = 2 if getattr(config, "model_type", "") in ("roberta", "xlm-roberta", "camembert") else 0
    return int(recorded or min(MAX_LENGTH, positions - reserved))
