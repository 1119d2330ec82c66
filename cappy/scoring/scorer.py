"""The scorer: loads a model folder of transformers, scores pairs, and saves."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar

from cappy.errors import ConfigError, FolderError
from cappy.model_folder import ModelFolder, open_model_folder
from cappy.records.folder import Manifest, describe_files, write_manifest
from cappy.scorers import open_scorer
from cappy.scoring.config import ChosenPrecision, Head, Precision, ScorerConfig, Truncation
from cappy.scoring.encoding import EncodedPair, PairEncoder, TruncationCounts, as_pairs
from cappy.scoring.folder import (
    FILES,
    max_positions,
    read_config,
    record_config,
    restore_token_types,
    use_token_types,
    warn_once,
    write_tokenizer,
)
from cappy.scoring.model import (
    batch_by_length,
    choose_precision,
    collate,
    convert_body_to_bf16,
    describe_modules,
    is_encoder,
    load_weights,
    padding_token_id,
    require_tokenizer,
)
from cappy.scoring.packed import can_pack, convert_matrices_to_bf16, packed_logits
from cappy.selection.linear import Candidates, Selector, read_selector

ForwardWrapper = Callable[[Callable[[PreTrainedModel], Tensor]], Tensor]
"""Runs a forward pass through the model; if weights are sharded, it gathers them first."""
BATCH_TOKENS = {"cpu": 2048, "cuda": 32768}
CHUNK_PAIRS = 4096


@dataclass(frozen=True, slots=True)
class SelectedResponse:
    """The best of several responses: its index and text, and the numbers of all responses in order.

    `values` are the selector's, by which it picked; they compare only within these responses.
    """

    index: int
    response: str
    scores: tuple[float, ...]
    logits: tuple[float, ...]
    values: tuple[float, ...]


class Scorer:
    """Scores how correct a response is for an instruction.

    The head `bce` gives scores from 0 to 1 (a sigmoid over soft labels); `mse` is the published raw regression. It is
    not clipped, because clipping makes ties, so its scores may be slightly outside 0 to 1. Head and activation run in
    fp32 whatever the precision of the body. A score does not depend on the other pairs of the call, nor on the thread
    (tolerance 1e-4 in fp32, 5e-3 in bf16). A response that fits alone is not truncated, unless the scorer's truncation
    is `longest_first`. `rank` orders responses by logits, because far from 0 the sigmoid gives equal scores to
    different logits. `select` picks by the selector that was evaluated with this scorer, if there is one.
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
        selector: Selector | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.head = config.head
        self.version = version
        self.precision = precision
        self.encoder = PairEncoder(tokenizer, config.max_length, config.truncation)
        self.truncation_counts = TruncationCounts(config.max_length)
        """Counts of the pairs that `score` and related methods truncated."""
        self.selector = selector or Selector()
        """The selector that `select` picks by; without one, the score alone."""
        self._source = source
        self._model_takes_token_types = "token_type_ids" in inspect.signature(model.forward).parameters
        self.device = next(model.parameters()).device
        self.forward_wrapper: ForwardWrapper | None = None
        self.has_new_head = False
        """Whether the head was never trained, so that the start of a training is not worth keeping."""
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
        config = folder.config()
        if is_encoder(folder, config):
            modules = f" with {modules}" if (modules := describe_modules(folder.path)) else ""
            remedy = "train a scorer from it first (cappy finetuning --scorer, or cappy adapt --scorer)"
            raise FolderError(f"{folder.path}: is an encoder{modules}, not a scorer: it has no head; {remedy}")
        model, tokenizer = load_weights(folder, config)
        restore_token_types(folder, config, tokenizer)
        scorer_config = read_config(folder, config, tokenizer, model)
        model.to(chosen_device).eval()
        version = folder.hash[:12]
        return cls(
            model,
            tokenizer,
            scorer_config,
            version=version,
            precision=chosen_precision,
            source=folder,
            selector=read_selector(folder.path, version),
        )

    @classmethod
    def from_encoder(
        cls, folder: ModelFolder, *, head: Head, max_length: int, truncation: Truncation = "middle"
    ) -> "Scorer":
        """A scorer in fp32 from the encoder in a folder, with a new head; a folder with a head keeps it.

        The new head depends on torch's random seed, which the caller sets. `max_length` is reduced to the encoder's
        positions. Raises FolderError if the folder has no tokenizer, if its weights are incomplete, or if its head is
        damaged or has several labels.
        """
        require_tokenizer(folder.path)
        config = folder.config()
        if new_head := is_encoder(folder, config, strict=False):
            config.num_labels = 1
        model, tokenizer = load_weights(folder, config, new_head=new_head)
        use_token_types(tokenizer, config)
        available = min(max_length, max_positions(model) or max_length)
        if available < max_length:
            text = f"has {available} positions, so pairs are truncated to {available} tokens, not {max_length}"
            warn_once(folder.path, text)
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        scorer = cls(model, tokenizer, ScorerConfig(head=head, max_length=available, truncation=truncation))
        scorer.has_new_head = new_head
        return scorer

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

    def select(
        self,
        instruction: str,
        responses: Sequence[str],
        *,
        likelihoods: Sequence[float] | None = None,
        greedy: int | None = None,
        closed_choices: bool = False,
        truncated: Sequence[int] = (),
    ) -> SelectedResponse:
        """The best response by the selector; of equally good responses, the first.

        The selector uses what is known; see `cappy.selection.Candidates`. Raises ConfigError if there are no responses
        or the rest does not fit them.
        """
        candidates = Candidates(
            responses=responses,
            likelihoods=likelihoods,
            greedy=greedy,
            closed_choices=closed_choices,
            truncated=truncated,
        )
        return next(self.select_stream([(instruction, candidates)]))

    def select_stream(self, pools: Iterable[tuple[str, Candidates | Sequence[str]]]) -> Iterator[SelectedResponse]:
        """`select` for a stream of (instruction, responses) of any length, in order, scored 4,096 pairs at a time.

        `Candidates` instead of the responses also say what else is known about them.
        """
        chunk: list[tuple[str, Candidates]] = []
        num_pairs = 0
        for instruction, responses in pools:
            candidates = responses if isinstance(responses, Candidates) else Candidates(responses=responses)
            chunk.append((instruction, candidates))
            num_pairs += len(candidates.responses)
            if num_pairs >= CHUNK_PAIRS:
                yield from self._select(chunk)
                chunk, num_pairs = [], 0
        yield from self._select(chunk)

    def _select(self, pools: Sequence[tuple[str, Candidates]]) -> Iterator[SelectedResponse]:
        pairs = [(instruction, response) for instruction, candidates in pools for response in candidates.responses]
        all_logits = iter(self.logits_of(pairs))
        for _, candidates in pools:
            logits = list(islice(all_logits, len(candidates.responses)))
            pool = candidates.with_scores(self.scores_of(logits), logits)
            ranking = self.selector.rank(pool)
            yield SelectedResponse(
                index=ranking.picked,
                response=candidates.responses[ranking.picked],
                scores=tuple(pool.scores.tolist()),
                logits=tuple(logits),
                values=tuple(ranking.values.tolist()),
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
        """Writes a scorer folder with its manifest, and returns the manifest. Raises the errors of `write`.

        The selector belongs to a version of the scorer, and this folder is another one, so it has none.
        """
        self.write(Path(folder))
        manifest = Manifest(step="save", files=describe_files(Path(folder)))
        write_manifest(Path(folder), manifest)
        return manifest
