"""What each step takes: seconds, hours of devices and of cores, bytes; from volumes and measured speeds.

Work with models is counted in floating point operations. Kaplan et al. 2020 (2.1) count 2 operations for each weight
and token forward, and twice as many backward; attention's two products are counted beside it. Weights of biases and
norms, and work on padding, count for nothing.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

from cappy.costing import PlanConfig, Step, Throughput
from cappy.costing.volumes import Volumes
from cappy.errors import ConfigError, quote
from cappy.training.meter import PEAK_FLOPS

CPU = "cpu"
"""The hardware of the measured speeds; a device of it is one core."""
MOST_SHARDS = 64
"""Shards of a pipeline's sampling, with a device each: collected artifacts hurt above (docs/scale.md)."""
CHECKS = 11
"""Times that pretraining scores the validation instances at its default, the first and the last check included."""
CHECKED = 16
"""Responses of a validation instance that a check scores at most (`cappy.training.checks.CHECK_CANDIDATES`)."""
CHECKPOINTS = 2
"""Generations of checkpoints kept at a time."""
_FORWARD = 1 / 3
"""Cost of scoring a pair, as a share of training on it."""
END = 1
"""Token that a generator draws after those of a response."""

HARDWARE: Mapping[str, float | None] = {
    CPU: None,
    **{name.lower().replace(" ", "-"): peak for name, peak in PEAK_FLOPS.items()},
}
"""Hardware -> dense bf16 FLOP/s of one device by its data sheet, None of a CPU."""

Pool = Literal["devices", "cores"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratorShape:
    """An encoder-decoder: layers of each half, widths of model, attention and feed-forward, size of the vocabulary."""

    layers: int
    hidden: int
    attention: int
    inner: int
    gated: bool
    vocabulary: int

    @property
    def encoder_weights(self) -> int:
        """Weights of the encoder's matrices."""
        return self.layers * (4 * self.hidden * self.attention + self._feed_forward)

    @property
    def decoder_weights(self) -> int:
        """Weights of the decoder's matrices that every response token passes, the vocabulary's included."""
        return self.layers * (6 * self.hidden * self.attention + self._feed_forward) + self.vocabulary * self.hidden

    @property
    def prompt_weights(self) -> int:
        """Weights of the decoder's matrices that prompt tokens pass: keys and values of cross-attention."""
        return self.layers * 2 * self.hidden * self.attention

    @property
    def _feed_forward(self) -> int:
        return (3 if self.gated else 2) * self.hidden * self.inner

    def prompt_flops(self, tokens: float, squared: float) -> float:
        """Operations of a prompt: `tokens` and `squared` are means of its tokens and of their square."""
        return 2 * (self.encoder_weights + self.prompt_weights) * tokens + 4 * self.layers * self.attention * squared

    def response_flops(self, tokens: float, prompt_tokens: float) -> float:
        """Operations of a response of so many tokens, drawn one by one after a prompt that is encoded."""
        looked_at = prompt_tokens + tokens / 2
        return tokens * (2 * self.decoder_weights + 4 * self.layers * self.attention * looked_at)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScorerShape:
    """An encoder whose feed-forward is four times as wide as the model."""

    layers: int
    hidden: int
    vocabulary: int
    positions: int = 514

    @property
    def layer_weights(self) -> int:
        """Weights of the matrices in the layers."""
        return 12 * self.layers * self.hidden**2

    @property
    def weights(self) -> int:
        """All weights, embeddings and head included."""
        return self.layer_weights + (self.vocabulary + self.positions + self.hidden) * self.hidden

    def training_flops(self, tokens: float, squared: float) -> float:
        """Operations of a pair, forward and backward, as `cappy.training.meter` counts them.

        `tokens` and `squared` are means of the pairs' tokens and of their squares.
        """
        return 6.0 * self.layer_weights * tokens + 12.0 * self.layers * self.hidden * squared

    def scoring_flops(self, tokens: float, squared: float) -> float:
        """Operations of a pair, forward alone."""
        return _FORWARD * self.training_flops(tokens, squared)


def _t5(layers: int, hidden: int, attention: int, inner: int) -> GeneratorShape:
    return GeneratorShape(layers=layers, hidden=hidden, attention=attention, inner=inner, gated=True, vocabulary=32_128)


GENERATORS: Mapping[str, GeneratorShape] = {
    "builtin": GeneratorShape(layers=3, hidden=160, attention=160, inner=640, gated=False, vocabulary=2_500),
    "bart0": GeneratorShape(layers=12, hidden=1024, attention=1024, inner=4096, gated=False, vocabulary=50_265),
    "t0-3b": _t5(24, 2048, 2048, 5120),
    "flan-t5-small": _t5(8, 512, 384, 1024),
    "flan-t5-base": _t5(12, 768, 768, 2048),
    "flan-t5-large": _t5(24, 1024, 1024, 2816),
    "flan-t5-xl": _t5(24, 2048, 2048, 5120),
    "flan-t5-xxl": _t5(24, 4096, 4096, 10240),
}
"""From the config.json of each: BART0 has BART-large's shape, T0-3B that of T5 1.1 XL."""

SCORERS: Mapping[str, ScorerShape] = {
    "builtin": ScorerShape(layers=4, hidden=160, vocabulary=2_501, positions=256),
    "mini": ScorerShape(layers=12, hidden=160, vocabulary=2_501, positions=256),
    "roberta-base": ScorerShape(layers=12, hidden=768, vocabulary=50_265),
    "roberta-large": ScorerShape(layers=24, hidden=1024, vocabulary=50_265),
}
"""`mini` is what `cappy pretraining --layers 12` makes of the built-in encoder."""

Shape = TypeVar("Shape")


def shape_of(name: str, shapes: Mapping[str, Shape], flag: str) -> Shape:
    """The shape of this name; ConfigError lists those there are."""
    if name not in shapes:
        raise ConfigError(f"plan: --{flag}: unknown shape {quote(name)}; choose one of {', '.join(shapes)}")
    return shapes[name]


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a step has to do, and how fast one device or core does it.

    `amount` is in `unit`, `rate` the same in a second, `start` the seconds before it begins, `most` the devices that
    can share it. `linear` is false where sharing costs, `holds` true where all devices wait on one core. `basis` says
    where the rate is from, and `measured` whether anybody measured it.
    """

    step: Step
    name: str
    amount: float
    unit: str
    rate: float
    start: float
    basis: str
    measured: bool
    pool: Pool = "devices"
    most: int | None = None
    linear: bool = True
    holds: bool = False
    tokens: float = 0.0
    bytes: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """A step on so many devices: wall-clock seconds, and the hours of devices and of CPU cores that it takes."""

    name: str
    used: int
    seconds: float
    device_hours: float
    core_hours: float


def peak_of(hardware: str) -> float | None:
    """The data sheet's FLOP/s of one device; ConfigError for hardware that is not known."""
    if hardware not in HARDWARE:
        raise ConfigError(f"plan: --hardware: unknown hardware {quote(hardware)}; choose one of {', '.join(HARDWARE)}")
    return HARDWARE[hardware]


def cost(work: Work, devices: int, config: PlanConfig, *, cores: int) -> Cost:
    """What a step takes on so many devices, the CPU steps on so many cores."""
    available = devices if work.pool == "devices" else cores
    used = min(available, work.most or available)
    share = 1.0 if work.linear or used == 1 else config.scaling
    seconds = work.start + work.amount / (work.rate * used * share)
    hours = seconds * used / 3600
    return Cost(
        name=work.name,
        used=used,
        seconds=seconds,
        device_hours=seconds * devices / 3600 if work.holds else hours if work.pool == "devices" else 0.0,
        core_hours=hours if work.pool == "cores" else 0.0,
    )


def works(volumes: Volumes, throughput: Throughput, config: PlanConfig) -> list[Work]:
    """The steps in order; ConfigError where a speed was neither measured nor is assumed.

    The measurements of the mixture of this name hold for prompts and pairs.
    """
    peak_of(config.hardware)
    rates = _Rates(throughput, config)
    scorer = shape_of(config.scorer, SCORERS, "scorer")
    stored = _bytes_written(volumes, rates)
    sampled = list(_sampling_work(volumes, rates, stored["sampling"]))
    return [
        rates.cpu("preparation", "prompts/s", volumes.prompts, bytes=stored["preparation"]),
        *sampled,
        rates.cpu("annotation", "pairs/s", volumes.pairs, bytes=stored["annotation"]),
        _tokenization_work(volumes, rates, stored["tokenization"]),
        _pretraining_work(volumes, rates, scorer),
        _evaluation(volumes, rates, scorer),
    ]


@dataclass(frozen=True, slots=True)
class _Rates:
    """Speeds by step: what was measured, else what is assumed."""

    throughput: Throughput
    config: PlanConfig

    def start(self, step: Step) -> float:
        """Seconds before a step begins, measured with the built-in models; 0 where it is part of another step."""
        speed = self.throughput.find(step, "seconds to start", hardware=CPU, of="builtin")
        return speed.value if speed else 0.0

    def cpu(self, step: Step, unit: Literal["prompts/s", "pairs/s"], amount: float, *, bytes: float) -> Work:
        """A step that CPU cores do, whatever the devices are."""
        speed = self.throughput.need(step, unit, hardware=CPU, of=self.config.mixture)
        return Work(
            step=step, name=step, amount=amount, unit=unit.removesuffix("/s"), rate=speed.value, pool="cores",
            start=self.start(step), basis=f"measured {speed.date}: {speed.value:,.0f} {unit} a core", measured=True,
            bytes=bytes,
        )  # fmt: skip

    def flops(self, step: Step, of: str) -> tuple[float, str, bool]:
        """FLOP/s of a device at a step, where that number is from, and whether it was measured."""
        hardware = self.config.hardware
        peak = peak_of(hardware)
        look = self.throughput.need if peak is None else self.throughput.find
        speed = look(step, "FLOP/s", hardware=hardware, of=of)
        if speed is not None:
            return (
                speed.value,
                f"measured {speed.date}: {speed.value / 1e9:,.0f} GFLOP/s a device",
                True,
            )
        assert peak is not None  # noqa: S101 (`need` has raised)
        flag, share = ("--sampling-mfu", self.config.sampling_mfu) if step == "sampling" else ("--mfu", self.config.mfu)
        if share is None:
            raise ConfigError(
                f"plan: {step} of {of} was never measured on {hardware}; give {flag}, the share of its data "
                f"sheet's {peak / 1e12:,.0f} TFLOP/s that you assume, above 0 and at most 1"
            )
        return peak * share, f"not measured: assumes {share:g} of the data-sheet peak ({flag})", False


def _bytes_written(volumes: Volumes, rates: _Rates) -> dict[str, float]:
    """Bytes of what each step writes; every folder of records holds the prompts again."""
    need, texts = rates.throughput.need, rates.config.mixture
    prompts = volumes.prompts * need("preparation", "bytes/prompt", hardware=CPU, of=texts).value
    candidates = volumes.candidates * need("sampling", "bytes/pair", hardware=CPU, of=texts).value
    labelled = volumes.pairs * need("annotation", "bytes/pair", hardware=CPU, of=texts).value
    tokens = volumes.pairs * need("tokenization", "bytes/pair", hardware=CPU, of=texts).value
    return {
        "preparation": prompts,
        "sampling": prompts + candidates,
        "annotation": prompts + labelled,
        "tokenization": tokens,
    }


def _sampling_work(volumes: Volumes, rates: _Rates, stored: float) -> Iterator[Work]:
    """One work for each generator, in turn over the same shards; the last one's folder is the one that stays."""
    drawn = volumes.response_tokens + END
    for place, (name, samples) in enumerate(volumes.samples.items(), start=1):
        shape = shape_of(name, GENERATORS, "generators")
        prompts = shape.prompt_flops(volumes.prompt.tokens, volumes.prompt.squared)
        responses = samples * shape.response_flops(drawn, volumes.prompt.tokens)
        rate, basis, measured = rates.flops("sampling", name)
        yield Work(
            step="sampling", name=f"sampling {name}", amount=volumes.open_prompts * (prompts + responses),
            unit="FLOP", rate=rate, start=rates.start("sampling"), basis=basis, measured=measured, most=MOST_SHARDS,
            tokens=volumes.open_prompts * (volumes.prompt.tokens + samples * drawn),
            bytes=stored if place == len(volumes.samples) else 0.0,
        )  # fmt: skip


def _tokenization_work(volumes: Volumes, rates: _Rates, stored: float) -> Work:
    """What pretraining does first, in one process, while its devices wait."""
    rate = rates.throughput.need("tokenization", "pairs/s", hardware=CPU, of=rates.config.mixture)
    return Work(
        step="tokenization", name="pretraining: tokens", amount=volumes.pairs, unit="pairs", rate=rate.value,
        start=0.0, basis=f"measured {rate.date}: {rate.value:,.0f} pairs/s, on one core", measured=True,
        pool="cores", most=1, holds=rates.config.hardware != CPU, bytes=stored,
    )  # fmt: skip


def _pretraining_work(volumes: Volumes, rates: _Rates, scorer: ScorerShape) -> Work:
    """Every epoch and the checks on the way, no early stop."""
    config = rates.config
    trained = volumes.pairs * (1 - config.validation) * config.epochs
    per_prompt = min(1.0, CHECKED / max(1.0, volumes.selectable / volumes.prompts))
    checked = volumes.selectable * per_prompt * config.validation * CHECKS
    rate, basis, measured = rates.flops("pretraining", config.scorer)
    tokens, squared = volumes.pair.tokens, volumes.pair.squared
    kept = rates.throughput.need("pretraining", "bytes/weight", hardware=CPU, of="builtin")
    return Work(
        step="pretraining", name="pretraining", unit="FLOP", rate=rate, start=rates.start("pretraining"),
        amount=trained * scorer.training_flops(tokens, squared) + checked * scorer.scoring_flops(tokens, squared),
        basis=basis, measured=measured, linear=False, tokens=trained * tokens,
        bytes=scorer.weights * (4 + CHECKPOINTS * kept.value),
    )  # fmt: skip


def _evaluation(volumes: Volumes, rates: _Rates, scorer: ScorerShape) -> Work:
    """Scores of the held-out pairs, on one device."""
    rate, basis, measured = rates.flops("evaluation", rates.config.scorer)
    tokens, squared = volumes.evaluated_pair.tokens, volumes.evaluated_pair.squared
    return Work(
        step="evaluation", name="evaluation", amount=volumes.evaluated_pairs * scorer.scoring_flops(tokens, squared),
        unit="FLOP", rate=rate, start=rates.start("evaluation"), basis=basis, measured=measured, most=1,
        tokens=volumes.evaluated_pairs * tokens,
    )  # fmt: skip
