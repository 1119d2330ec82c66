"""Shapes of generators and scorers, and the floating point operations that a token costs in them.

Kaplan et al. 2020 (2.1) count 2 operations for each weight and token forward, and twice as many backward; attention's
two products are counted beside it. Weights of biases and norms, and work on padding, count for nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from cappy.errors import ConfigError, shown

FORWARD = 1 / 3
"""Cost of scoring a pair, as a share of training on it."""


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
        return FORWARD * self.training_flops(tokens, squared)


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
        raise ConfigError(f"plan: --{flag}: no shape {shown(name)}; choose of {', '.join(shapes)}")
    return shapes[name]
