"""The scorer: loads a model folder of transformers, scores pairs, and saves."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from cappy.errors import ConfigError, FolderError
from cappy.model_folder import ModelFolder, open_model_folder
from cappy.records.folder import Manifest, describe_files, write_manifest
from cappy.scorers import open_scorer
from cappy.scoring.config import ChosenPrecision, Precision, ScorerConfig
from cappy.scoring.encoding import EncodedPair, PairEncoder, TruncationCounts, as_pairs
from cappy.scoring.folder import (
    FILES,
    check_single_label,
    read_config,
    record_config,
    restore_token_types,
    write_tokenizer,
)
from cappy.scoring.forward import (
    batch_by_length,
    can_pack,
    choose_precision,
    collate,
    convert_body_to_bf16,
    convert_matrices_to_bf16,
    packed_logits,
    padding_token_id,
)

ForwardWrapper = Callable[[Callable[[PreTrainedModel], Tensor]], Tensor]
"""Runs a forward pass through the model; if weights are sharded, it gathers them first."""
BATCH_TOKENS = {"cpu": 2048, "cuda": 32768}
CHUNK_PAIRS = 4096


@dataclass(frozen=True, slots=True)
class SelectedResponse:
    """The best of several responses: its index and text, and the scores and logits of all responses in order."""

    index: int
    response: str
    scores: tuple[float, ...]
    logits: tuple[float, ...]


class Scorer:
    """Scores how correct a response is for an instruction.

    The head `bce` gives scores from 0 to 1 (a sigmoid over soft labels); `mse` is the published raw regression. It is
    not clipped, because clipping makes ties, so its scores may be slightly outside 0 to 1. Head and activation run in
    fp32 whatever the precision of the body. A score does not depend on the other pairs of the call, nor on the thread
    (tolerance 1e-4 in fp32, 5e-3 in bf16). A response that fits alone is not truncated, unless the scorer's truncation
    is `longest_first`. Responses are ranked by logits, because far from 0 the sigmoid gives equal scores to different
    logits.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: ScorerConfig,
        *,
        version: str = "",
        precision: ChosenPrecision = "fp32",
        source: ModelFolder | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.head = config.head
        self.version = version
        self.precision = precision
        self.encoder = PairEncoder(tokenizer, config.max_length, config.truncation)
        self.truncation_counts = TruncationCounts(config.max_length)
        """Counts of the pairs that `score` and related methods truncated."""
        self._source = source
        self._model_takes_token_types = "token_type_ids" in inspect.signature(model.forward).parameters
        self.device = next(model.parameters()).device
        self.forward_wrapper: ForwardWrapper | None = None
        self.autocast = False
        """Whether forward passes run under bf16 autocast, as in training on a GPU; see `keep_heads_in_fp32`."""
        if precision == "bf16" and self._packs:
            convert_matrices_to_bf16(model)
        elif precision == "bf16":
            convert_body_to_bf16(model)

    @classmethod
    def load(cls, spec: str, *, device: str | None = None, precision: Precision = "auto") -> "Scorer":
        """Loads the scorer of a spec and verifies its files.

        The default device is a GPU if there is one. `auto` runs the body in bf16 if the device has instructions for it,
        else in fp32. Training needs `fp32`. Raises FolderError if the folder is not a scorer, is damaged or contains a
        pickle, and ConfigError if the precision is unknown.
        """
        chosen_device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        chosen_precision = choose_precision(precision, chosen_device)
        folder = open_scorer(spec)
        disable_progress_bar()
        config = folder.config()
        check_single_label(folder.path, config)
        model, missing = folder.model(AutoModelForSequenceClassification, config)
        if missing:
            problem = "is an encoder, not a scorer: its weights have no" if "classifier" in missing[0] else "lacks"
            remedy = "make a scorer of it first (cappy pretraining --encoder)"
            raise FolderError(f"{folder.path}: {problem} {missing[0]}; {remedy}")
        tokenizer = folder.tokenizer()
        if (highest := max(tokenizer.get_vocab().values(), default=0)) >= model.get_input_embeddings().num_embeddings:
            remedy = "save the tokenizer of its training in this folder"
            raise FolderError(f"{folder.path}: its tokenizer has token {highest}, which the model lacks; {remedy}")
        restore_token_types(folder, config, tokenizer)
        scorer_config = read_config(folder, config, tokenizer, model)
        model.to(chosen_device).eval()
        return cls(model, tokenizer, scorer_config, version=folder.hash[:12], precision=chosen_precision, source=folder)

    def score(self, pairs: Sequence[Sequence[str]]) -> list[float]:
        """One score per pair, in their order; equal pairs are scored once.

        A pair is a tuple or a list of two texts, instruction and response. Raises ConfigError for anything else.
        """
        return self.scores_of(self.logits_of(pairs))

    def logits_of(self, pairs: Sequence[Sequence[str]]) -> list[float]:
        """The logits of pairs, which `score` passes to the activation; unlike scores, they have no ties by rounding."""
        pairs = as_pairs(pairs)
        if not pairs:
            return []
        distinct = list(dict.fromkeys(pairs))
        encoded = self.encoder.encode(distinct)
        self.truncation_counts.count(encoded)
        batches = list(batch_by_length(encoded, self.batch_tokens))
        logits = torch.cat([self.infer_logits([encoded[index] for index in batch]) for batch in batches])
        order = [index for batch in batches for index in batch]
        by_pair = {distinct[index]: value for index, value in zip(order, logits.float().tolist(), strict=True)}
        return [by_pair[pair] for pair in pairs]

    def scores_of(self, logits: Sequence[float]) -> list[float]:
        """The scores of logits, in order."""
        return self.to_scores(torch.tensor(logits, dtype=torch.float64))

    def score_stream(self, pairs: Iterable[Sequence[str]]) -> Iterator[float]:
        """Scores a stream of any length, in order, with constant memory.

        Pairs are scored 4,096 at a time; equal pairs among these are scored once.
        """
        iterator = iter(pairs)
        while chunk := list(islice(iterator, CHUNK_PAIRS)):
            yield from self.score(chunk)

    def rank(self, instruction: str, responses: Sequence[str]) -> list[tuple[int, float]]:
        """(index, score) of the responses, best first; equally good responses stay in order."""
        logits = self.logits_of([(instruction, response) for response in responses])
        scores = self.scores_of(logits)
        return [(index, scores[index]) for index in sorted(range(len(logits)), key=lambda index: -logits[index])]

    def select(self, instruction: str, responses: Sequence[str]) -> SelectedResponse:
        """The best response; of equally good responses, the first. Raises ConfigError if there are no responses."""
        return next(self.select_stream([(instruction, responses)]))

    def select_stream(self, pools: Iterable[tuple[str, Sequence[str]]]) -> Iterator[SelectedResponse]:
        """`select` for a stream of (instruction, responses) of any length, in order, scored 4,096 pairs at a time."""
        chunk: list[tuple[str, Sequence[str]]] = []
        num_pairs = 0
        for instruction, responses in pools:
            if not responses:
                raise ConfigError("select: there are no responses to choose from; pass at least one")
            chunk.append((instruction, responses))
            num_pairs += len(responses)
            if num_pairs >= CHUNK_PAIRS:
                yield from self._select(chunk)
                chunk, num_pairs = [], 0
        yield from self._select(chunk)

    def _select(self, pools: Sequence[tuple[str, Sequence[str]]]) -> Iterator[SelectedResponse]:
        logits = iter(self.logits_of([(instruction, response) for instruction, pool in pools for response in pool]))
        for _, responses in pools:
            pool_logits = tuple(islice(logits, len(responses)))
            index = pool_logits.index(max(pool_logits))
            yield SelectedResponse(
                index=index,
                response=responses[index],
                scores=tuple(self.scores_of(pool_logits)),
                logits=pool_logits,
            )

    @torch.inference_mode()
    def infer_logits(self, batch: Sequence[EncodedPair]) -> Tensor:
        """Logits (pairs,) without gradients, in fp32, on the model's device; see `pads` for padding."""
        return self._logits(batch)

    def training_logits(self, batch: Sequence[EncodedPair]) -> Tensor:
        """Like `infer_logits`, but with gradients. Raises ConfigError if the scorer was loaded in bf16."""
        if self.precision == "bf16":
            raise ConfigError("a scorer loaded in bf16 cannot be trained; load it with precision fp32")
        return self._logits(batch)

    @property
    def pads(self) -> bool:
        """Whether the pairs of a batch are padded: on a GPU in fp32, and for unknown architectures."""
        return not self._packs or not (self.device.type == "cpu" or self.precision == "bf16")

    def _logits(self, batch: Sequence[EncodedPair]) -> Tensor:
        if not self.pads:
            return self._run_model(lambda model: packed_logits(model, batch, self.device))
        pad = padding_token_id(self.model.config)
        if pad is None and not self._packs:
            return self._run_model(lambda model: torch.cat([self._padded_logits(model, [pair], 0) for pair in batch]))
        return self._run_model(lambda model: self._padded_logits(model, batch, pad or 0))

    def _padded_logits(self, model: PreTrainedModel, batch: Sequence[EncodedPair], pad: int) -> Tensor:
        inputs = collate(batch, pad=pad, token_types=self._uses_token_types, device=self.device)
        logits: Tensor = model(**inputs).logits.float().squeeze(-1)
        return logits

    def _run_model(self, compute: Callable[[PreTrainedModel], Tensor]) -> Tensor:
        def run(model: PreTrainedModel) -> Tensor:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
                return compute(model)

        return self.forward_wrapper(run) if self.forward_wrapper else run(self.model)

    def activate(self, logits: Tensor) -> Tensor:
        """Scores from logits: the sigmoid of a `bce` head, the identity of an `mse` head."""
        return logits.sigmoid() if self.head == "bce" else logits

    def to_scores(self, logits: Tensor) -> list[float]:
        """Scores as floats, in order. The sigmoid is in fp64, which distinguishes logits up to 36 (fp32: up to 17)."""
        values: list[float] = self.activate(logits.cpu().double()).tolist()
        return values

    @property
    def batch_tokens(self) -> int:
        """Maximum number of tokens per batch on the device."""
        return BATCH_TOKENS.get(self.device.type, BATCH_TOKENS["cpu"])

    @property
    def _packs(self) -> bool:
        """Whether pairs can be packed; computed at each access, because training may replace the model."""
        return can_pack(self.model)

    @property
    def _uses_token_types(self) -> bool:
        size = getattr(self.model.config, "type_vocab_size", None)
        return self.encoder.has_token_types and self._model_takes_token_types and (size is None or size > 1)

    def write(self, folder: Path) -> None:
        """Writes weights in fp32 (safetensors), configuration and tokenizer, without a manifest.

        If the scorer was loaded in bf16, the fp32 weights are read again from its folder. Raises ConfigError or
        FolderError if it has no folder, or if its content has changed.
        """
        for name in FILES:
            if (folder / name).exists():
                remedy = "choose a new folder"
                raise FolderError(f"{folder / name}: would change the scores of a scorer in this folder; {remedy}")
        model = self.model if self.precision == "fp32" else self._reload_fp32()
        folder.mkdir(parents=True, exist_ok=True)
        encoder = self.encoder
        scorer_config = ScorerConfig(head=self.head, max_length=encoder.max_length, truncation=encoder.truncation)
        record_config(model.config, scorer_config)
        disable_progress_bar()
        model.save_pretrained(folder)
        write_tokenizer(self.tokenizer, folder, self.encoder.max_length, token_types=self._uses_token_types)

    def _reload_fp32(self) -> PreTrainedModel:
        """Loads the model again from the folder of this scorer, in fp32 on the CPU."""
        if self._source is None:
            raise ConfigError(
                f"a scorer in {self.precision} that was not loaded from a folder cannot be saved; use precision fp32"
            )
        folder = open_model_folder(self._source.path, pinned=True)
        if folder.hash != self._source.hash:
            raise FolderError(f"{folder.path}: has changed since it was loaded; load it again, then save it")
        return folder.model(AutoModelForSequenceClassification, folder.config())[0]

    def save(self, folder: str | Path) -> Manifest:
        """Writes a scorer folder with its manifest, and returns the manifest. Raises the errors of `write`."""
        self.write(Path(folder))
        manifest = Manifest(step="save", files=describe_files(Path(folder)))
        write_manifest(Path(folder), manifest)
        return manifest
