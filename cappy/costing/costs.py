"""Computes the cost of each step in seconds, device-hours, core-hours and bytes, from volumes and measured speeds.

The work of models is counted in floating-point operations. Kaplan et al. 2020 (section 2.1) count 2 operations per
weight and token in the forward pass, and twice as many in the backward pass; the two products of attention are added.
Biases, norms and padding are ignored.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

from cappy.costing import PlanConfig, Step, Throughput
from cappy.costing.volumes import Volumes
from cappy.errors import ConfigError, quote
from cappy.training.meter import PEAK_FLOPS

CPU = "cpu"
"""The hardware on which speeds were measured; one device is one core."""
MAX_SHARDS = 64
"""Shards of sampling in a pipeline, each with a device; more would slow down collecting artifacts (docs/scale.md)."""
NUM_VALIDATIONS = 11
"""Number of validations during pretraining by default, including the first and the last one."""
MAX_VALIDATION_CANDIDATES = 16
"""Maximum candidates of a validation instance that are scored (`cappy.training.checks.CHECK_CANDIDATES`)."""
CHECKPOINTS = 2
"""Number of checkpoints that are kept."""
_FORWARD_SHARE = 1 / 3
"""Cost of scoring a pair relative to that of training on it."""
END_TOKENS = 1
"""The end-of-sequence token after a response."""

HARDWARE: Mapping[str, float | None] = {
    CPU: None,
    **{name.lower().replace(" ", "-"): peak for name, peak in PEAK_FLOPS.items()},
}
"""Hardware -> dense bf16 FLOP/s of one device in its data sheet, None for a CPU."""

Processors = Literal["devices", "cores"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratorShape:
    """The shape of an encoder-decoder: layers per stack, width of model, attention and feed-forward, vocabulary size.

    A `gated` feed-forward has three matrices instead of two.
    """

    layers: int
    hidden: int
    attention: int
    inner: int
    gated: bool
    vocabulary: int

    @property
    def encoder_weights(self) -> int:
        """Weights of the matrices in the encoder."""
        return self.layers * (4 * self.hidden * self.attention + self._feed_forward)

    @property
    def decoder_weights(self) -> int:
        """Weights of the decoder that every response token passes, including the output layer."""
        return self.layers * (6 * self.hidden * self.attention + self._feed_forward) + self.vocabulary * self.hidden

    @property
    def prompt_weights(self) -> int:
        """Weights of the decoder that prompt tokens pass: keys and values of cross-attention."""
        return self.layers * 2 * self.hidden * self.attention

    @property
    def _feed_forward(self) -> int:
        return (3 if self.gated else 2) * self.hidden * self.inner

    def prompt_flops(self, tokens: float, squared: float) -> float:
        """Operations for a prompt; `tokens` is its mean number of tokens, `squared` the mean of that number squared."""
        return 2 * (self.encoder_weights + self.prompt_weights) * tokens + 4 * self.layers * self.attention * squared

    def response_flops(self, tokens: float, prompt_tokens: float) -> float:
        """Operations for a response of `tokens` tokens, generated one by one after an encoded prompt."""
        attended = prompt_tokens + tokens / 2
        return tokens * (2 * self.decoder_weights + 4 * self.layers * self.attention * attended)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScorerShape:
    """The shape of an encoder whose feed-forward is four times as wide as the model."""

    layers: int
    hidden: int
    vocabulary: int
    positions: int = 514

    @property
    def layer_weights(self) -> int:
        """Weights of the matrices in all layers."""
        return 12 * self.layers * self.hidden**2

    @property
    def weights(self) -> int:
        """All weights, including embeddings and head."""
        return self.layer_weights + (self.vocabulary + self.positions + self.hidden) * self.hidden

    def training_flops(self, tokens: float, squared: float) -> float:
        """Operations for a pair, forward and backward, counted like in `cappy.training.meter`.

        `tokens` is the mean number of tokens of a pair, `squared` the mean of that number squared.
        """
        return 6.0 * self.layer_weights * tokens + 12.0 * self.layers * self.hidden * squared

    def scoring_flops(self, tokens: float, squared: float) -> float:
        """Operations for a pair, forward only; arguments like those of `training_flops`."""
        return _FORWARD_SHARE * self.training_flops(tokens, squared)


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
"""Shapes from each config.json; BART0 has the shape of BART-large, T0-3B that of T5 1.1 XL."""

SCORERS: Mapping[str, ScorerShape] = {
    "builtin": ScorerShape(layers=4, hidden=160, vocabulary=2_501, positions=256),
    "mini": ScorerShape(layers=12, hidden=160, vocabulary=2_501, positions=256),
    "roberta-base": ScorerShape(layers=12, hidden=768, vocabulary=50_265),
    "roberta-large": ScorerShape(layers=24, hidden=1024, vocabulary=50_265),
}
"""`mini` is the built-in encoder with `cappy pretraining --layers 12`."""

Shape = TypeVar("Shape")


def find_shape(name: str, shapes: Mapping[str, Shape], flag: str) -> Shape:
    """The shape with this name; for an unknown name, raises ConfigError with the known ones."""
    if name not in shapes:
        raise ConfigError(f"plan: --{flag}: unknown shape {quote(name)}; choose one of {', '.join(shapes)}")
    return shapes[name]


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """The work of a step, and how fast one device or core does it.

    `amount` is in `unit` and `rate` in `unit` per second; `start` is the startup time in seconds, `max_devices` the
    maximum number of devices. `linear` is false if several devices have overhead, `blocks_devices` true if all devices
    wait for one core. `basis` describes the origin of the rate; `measured` says whether it was measured. `tokens` is
    the number of tokens processed, `bytes` the storage that the output needs.
    """

    step: Step
    name: str
    amount: float
    unit: str
    rate: float
    start: float
    basis: str
    measured: bool
    processors: Processors = "devices"
    max_devices: int | None = None
    linear: bool = True
    blocks_devices: bool = False
    tokens: float = 0.0
    bytes: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Wall-clock seconds, device-hours and core-hours of a step on `used` devices."""

    name: str
    used: int
    seconds: float
    device_hours: float
    core_hours: float


def peak_of(hardware: str) -> float | None:
    """FLOP/s of one device in its data sheet, None for a CPU; raises ConfigError for unknown hardware."""
    if hardware not in HARDWARE:
        raise ConfigError(f"plan: --hardware: unknown hardware {quote(hardware)}; choose one of {', '.join(HARDWARE)}")
    return HARDWARE[hardware]


def cost(work: Work, devices: int, config: PlanConfig, *, cores: int) -> Cost:
    """The cost of a step on `devices` devices, or on `cores` cores for CPU steps."""
    available = devices if work.processors == "devices" else cores
    used = min(available, work.max_devices or available)
    share = 1.0 if work.linear or used == 1 else config.scaling
    seconds = work.start + work.amount / (work.rate * used * share)
    hours = seconds * used / 3600
    return Cost(
        name=work.name,
        used=used,
        seconds=seconds,
        device_hours=seconds * devices / 3600
        if work.blocks_devices
        else hours
        if work.processors == "devices"
        else 0.0,
        core_hours=hours if work.processors == "cores" else 0.0,
    )


def list_work(volumes: Volumes, throughput: Throughput, config: PlanConfig) -> list[Work]:
    """The work of all steps, in order; raises ConfigError if a speed is neither measured nor assumed.

    Speeds in prompts and pairs per second are those measured on the mixture of the config.
    """
    peak_of(config.hardware)
    rates = _Rates(throughput, config)
    scorer = find_shape(config.scorer, SCORERS, "scorer")
    stored_bytes = _bytes_written(volumes, rates)
    sampling = list(_sampling_work(volumes, rates, stored_bytes["sampling"]))
    return [
        rates.cpu_work("preparation", "prompts/s", volumes.prompts, bytes=stored_bytes["preparation"]),
        *sampling,
        rates.cpu_work("annotation", "pairs/s", volumes.pairs, bytes=stored_bytes["annotation"]),
        _tokenization_work(volumes, rates, stored_bytes["tokenization"]),
        _pretraining_work(volumes, rates, scorer),
        _evaluation_work(volumes, rates, scorer),
    ]


@dataclass(frozen=True, slots=True)
class _Rates:
    """The speeds of the steps: measured if there is a measurement, else assumed."""

    throughput: Throughput
    config: PlanConfig

    def startup_seconds(self, step: Step) -> float:
        """Startup seconds of a step, measured with the built-in models; 0 if it is part of another step."""
        speed = self.throughput.find(step, "seconds to start", hardware=CPU, subject="builtin")
        return speed.value if speed else 0.0

    def cpu_work(self, step: Step, unit: Literal["prompts/s", "pairs/s"], amount: float, *, bytes: float) -> Work:
        """The work of a step that runs on CPU cores."""
        speed = self.throughput.need(step, unit, hardware=CPU, subject=self.config.mixture)
        return Work(
            step=step, name=step, amount=amount, unit=unit.removesuffix("/s"), rate=speed.value, processors="cores",
            start=self.startup_seconds(step), basis=f"measured {speed.date}: {speed.value:,.0f} {unit} a core",
            measured=True, bytes=bytes,
        )  # fmt: skip

    def flops_per_second(self, step: Step, subject: str) -> tuple[float, str, bool]:
        """FLOP/s of one device in a step, the origin of that number, and whether it was measured."""
        hardware = self.config.hardware
        peak = peak_of(hardware)
        lookup = self.throughput.need if peak is None else self.throughput.find
        speed = lookup(step, "FLOP/s", hardware=hardware, subject=subject)
        if speed is not None:
            return (
                speed.value,
                f"measured {speed.date}: {speed.value / 1e9:,.0f} GFLOP/s a device",
                True,
            )
        assert peak is not None  # noqa: S101 (otherwise `need` has raised)
        flag, share = ("--sampling-mfu", self.config.sampling_mfu) if step == "sampling" else ("--mfu", self.config.mfu)
        if share is None:
            raise ConfigError(
                f"plan: {step} of {subject} was not measured on {hardware}; give {flag}, the assumed share of the "
                f"{peak / 1e12:,.0f} TFLOP/s in its data sheet, above 0 and at most 1"
            )
        return peak * share, f"not measured: assumes {share:g} of the data-sheet peak ({flag})", False


def _bytes_written(volumes: Volumes, rates: _Rates) -> dict[str, float]:
    """The number of bytes that each step writes; every folder of records contains the prompts again."""
    need, mixture = rates.throughput.need, rates.config.mixture
    prompts = volumes.prompts * need("preparation", "bytes/prompt", hardware=CPU, subject=mixture).value
    candidates = volumes.candidates * need("sampling", "bytes/pair", hardware=CPU, subject=mixture).value
    labelled = volumes.pairs * need("annotation", "bytes/pair", hardware=CPU, subject=mixture).value
    tokens = volumes.pairs * need("tokenization", "bytes/pair", hardware=CPU, subject=mixture).value
    return {
        "preparation": prompts,
        "sampling": prompts + candidates,
        "annotation": prompts + labelled,
        "tokenization": tokens,
    }


def _sampling_work(volumes: Volumes, rates: _Rates, stored_bytes: float) -> Iterator[Work]:
    """The work of each generator; they run one after another on the same shards, and only the last folder is kept."""
    response_tokens = volumes.response_tokens + END_TOKENS
    for number, (name, samples) in enumerate(volumes.samples.items(), start=1):
        shape = find_shape(name, GENERATORS, "generators")
        prompts = shape.prompt_flops(volumes.prompt.tokens, volumes.prompt.squared)
        responses = samples * shape.response_flops(response_tokens, volumes.prompt.tokens)
        rate, basis, measured = rates.flops_per_second("sampling", name)
        yield Work(
            step="sampling", name=f"sampling {name}", amount=volumes.open_prompts * (prompts + responses),
            unit="FLOP", rate=rate, start=rates.startup_seconds("sampling"), basis=basis, measured=measured,
            max_devices=MAX_SHARDS, tokens=volumes.open_prompts * (volumes.prompt.tokens + samples * response_tokens),
            bytes=stored_bytes if number == len(volumes.samples) else 0.0,
        )  # fmt: skip


def _tokenization_work(volumes: Volumes, rates: _Rates, stored_bytes: float) -> Work:
    """The work of tokenization at the start of pretraining, in one process while the devices wait."""
    rate = rates.throughput.need("tokenization", "pairs/s", hardware=CPU, subject=rates.config.mixture)
    return Work(
        step="tokenization", name="pretraining: tokens", amount=volumes.pairs, unit="pairs", rate=rate.value,
        start=0.0, basis=f"measured {rate.date}: {rate.value:,.0f} pairs/s, on one core", measured=True,
        processors="cores", max_devices=1, blocks_devices=rates.config.hardware != CPU, bytes=stored_bytes,
    )  # fmt: skip


def _pretraining_work(volumes: Volumes, rates: _Rates, scorer: ScorerShape) -> Work:
    """The work of all epochs and validations, without early stopping."""
    config = rates.config
    trained_pairs = volumes.pairs * (1 - config.validation) * config.epochs
    scored_share = min(1.0, MAX_VALIDATION_CANDIDATES / max(1.0, volumes.selectable / volumes.prompts))
    checked_pairs = volumes.selectable * scored_share * config.validation * NUM_VALIDATIONS
    rate, basis, measured = rates.flops_per_second("pretraining", config.scorer)
    tokens, squared = volumes.pair.tokens, volumes.pair.squared
    training_flops = trained_pairs * scorer.training_flops(tokens, squared)
    checking_flops = checked_pairs * scorer.scoring_flops(tokens, squared)
    checkpoint = rates.throughput.need("pretraining", "bytes/weight", hardware=CPU, subject="builtin")
    return Work(
        step="pretraining", name="pretraining", unit="FLOP", rate=rate, start=rates.startup_seconds("pretraining"),
        amount=training_flops + checking_flops, basis=basis, measured=measured, linear=False,
        tokens=trained_pairs * tokens,
        bytes=scorer.weights * (4 + CHECKPOINTS * checkpoint.value),
    )  # fmt: skip


def _evaluation_work(volumes: Volumes, rates: _Rates, scorer: ScorerShape) -> Work:
    """The work of scoring the held-out pairs on one device."""
    rate, basis, measured = rates.flops_per_second("evaluation", rates.config.scorer)
    tokens, squared = volumes.evaluated_pair.tokens, volumes.evaluated_pair.squared
    return Work(
        step="evaluation", name="evaluation", amount=volumes.evaluated_pairs * scorer.scoring_flops(tokens, squared),
        unit="FLOP", rate=rate, start=rates.startup_seconds("evaluation"), basis=basis, measured=measured,
        max_devices=1, tokens=volumes.evaluated_pairs * tokens,
    )  # fmt: skip
