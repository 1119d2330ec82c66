"""The encoder as a pure function over a dict of arrays: BERT and RoBERTa with a classification head of one label.

The arrays come from a torch model and go back into one.

Arrays keep the names of the scorer folder, except that the layers' arrays are stacked: `bert.encoder.layer.*.x` has
the shape (layers, ...) of every `bert.encoder.layer.N.x`. XLA then compiles one layer, not all of them.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Required, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import Array, lax
from numpy.typing import NDArray
from torch import Tensor

from cappy.errors import ConfigError, quote

Params = dict[str, Array]
Arrays = dict[str, NDArray[np.float32]]

ARCHITECTURES: Mapping[str, Literal["bert", "roberta"]] = {
    "BertForSequenceClassification": "bert",
    "RobertaForSequenceClassification": "roberta",
}
_ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}
EXACT = lax.Precision.HIGHEST
"""A TPU multiplies fp32 in passes of bf16, unless it is asked to be exact."""
_LAYER = re.compile(r"^(\w+\.encoder\.layer\.)(\d+)\.(.+)$")
# Numbers that tell the dropouts of one pass apart; layer n has 3 n + 3 and the two after it.
_EMBEDDINGS, _HEAD, _HEAD_OUT, _FIRST_LAYER = range(4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """What of a model's configuration the forward pass needs; `positions` is the longest pair, in tokens."""

    kind: Literal["bert", "roberta"]
    layers: int
    heads: int
    positions: int
    pad: int
    epsilon: float
    activation: str
    hidden_dropout: float
    attention_dropout: float
    head_dropout: float

    @property
    def stack_prefix(self) -> str:
        """How the names of the layers' stacked arrays begin."""
        return f"{self.kind}.encoder.layer.*."


class EncoderConfig(TypedDict, total=False):
    """What is read of a model's configuration as transformers writes it."""

    hidden_act: Required[str]
    is_decoder: bool
    num_labels: int
    num_hidden_layers: Required[int]
    num_attention_heads: Required[int]
    max_position_embeddings: Required[int]
    pad_token_id: Required[int]
    layer_norm_eps: Required[float]
    hidden_dropout_prob: Required[float]
    attention_probs_dropout_prob: Required[float]
    classifier_dropout: float | None


def parse_architecture(name: str, config: EncoderConfig) -> Architecture:
    """The architecture that a model class and its configuration name; ConfigError if it is none of ours."""
    if name not in ARCHITECTURES:
        raise ConfigError(
            f"--parallelism jax: trains {' and '.join(ARCHITECTURES)}, got {quote(name)}; give --parallelism single"
        )
    kind = ARCHITECTURES[name]
    for field, wanted in (("hidden_act", tuple(_ACTIVATIONS)), ("is_decoder", (False,)), ("num_labels", (1,))):
        value = config.get(field, wanted[0])
        if value not in wanted:
            allowed = " or ".join(map(str, wanted))
            remedy = "give --parallelism single"
            raise ConfigError(f"config.json: {field}: --parallelism jax knows {allowed}, got {quote(value)}; {remedy}")
    head_dropout = config.get("classifier_dropout")
    return Architecture(
        kind=kind,
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        # RoBERTa counts positions from the one after the padding token's number.
        positions=config["max_position_embeddings"] - (config["pad_token_id"] + 1 if kind == "roberta" else 0),
        pad=config["pad_token_id"],
        epsilon=config["layer_norm_eps"],
        activation=config["hidden_act"],
        hidden_dropout=config["hidden_dropout_prob"],
        attention_dropout=config["attention_probs_dropout_prob"],
        head_dropout=config["hidden_dropout_prob"] if head_dropout is None else head_dropout,
    )


def forward(
    params: Params,
    arch: Architecture,
    ids: Array,
    types: Array,
    lengths: Array,
    *,
    keys: Array | None = None,
) -> Array:
    """Logits (rows,) in fp32 of token ids and token types (rows, length), of which the first `lengths` (rows,) count.

    `keys` (rows,) are the dropout keys of the rows, None for no dropout. A row's dropout depends on its key alone: not
    on its place, on the padding or on the other rows.
    """
    attended = jnp.arange(ids.shape[1]) < lengths[:, None]
    hidden = _embed(params, arch, ids, types)
    hidden = _dropout(hidden, keys, _EMBEDDINGS, arch.hidden_dropout)
    stacked = {
        name.removeprefix(arch.stack_prefix): a for name, a in params.items() if name.startswith(arch.stack_prefix)
    }

    def layer(hidden: Array, numbered: tuple[Params, Array]) -> tuple[Array, None]:
        return _layer(numbered[0], arch, hidden, attended, keys, 3 * numbered[1] + _FIRST_LAYER), None

    hidden, _ = lax.scan(layer, hidden, (stacked, jnp.arange(arch.layers)))
    return _head(params, arch, hidden[:, 0], keys)


def stack(tensors: Arrays) -> Arrays:
    """The tensors with every layer's `x.encoder.layer.N.y` stacked as `x.encoder.layer.*.y`, (layers, ...)."""
    stacked: Arrays = {}
    layers: dict[str, dict[int, NDArray[np.float32]]] = {}
    for name, tensor in tensors.items():
        if match := _LAYER.match(name):
            layers.setdefault(f"{match[1]}*.{match[3]}", {})[int(match[2])] = tensor
        else:
            stacked[name] = tensor
    return stacked | {name: np.stack([of[number] for number in sorted(of)]) for name, of in layers.items()}


def unstack(params: Params) -> Arrays:
    """The inverse of `stack`: one array per name of the scorer folder, copied to the host, each in its own memory."""
    tensors: Arrays = {}
    for name, array in params.items():
        values = np.array(array)
        if ".*." in name:
            tensors |= {name.replace("*", str(number), 1): value.copy() for number, value in enumerate(values)}
        else:
            tensors[name] = values
    return tensors


def from_torch(tensors: Mapping[str, Tensor]) -> Arrays:
    """Torch's tensors as fp32 arrays, copied: JAX may otherwise share memory with the model."""
    return {name: np.array(tensor.detach().float().cpu().numpy()) for name, tensor in tensors.items()}


def to_torch(arrays: Arrays) -> dict[str, Tensor]:
    """Arrays as torch's tensors, which take over their memory."""
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def decay_mask(params: Arrays, arch: Architecture) -> dict[str, bool]:
    """Which arrays decay: those of two or more dimensions in the scorer folder, so no bias and no norm."""
    return {name: array.ndim - name.startswith(arch.stack_prefix) >= 2 for name, array in params.items()}


def _embed(params: Params, arch: Architecture, ids: Array, types: Array) -> Array:
    names = f"{arch.kind}.embeddings"
    padding = (ids == arch.pad)[:, :, None]
    words = _stop_gradient_at(params[f"{names}.word_embeddings.weight"][ids], padding)
    table = params[f"{names}.position_embeddings.weight"]
    if arch.kind == "roberta":
        counted = (ids != arch.pad).astype(jnp.int32)
        positions = _stop_gradient_at(table[jnp.cumsum(counted, axis=1) * counted + arch.pad], padding)
    else:
        positions = table[jnp.arange(ids.shape[1])]
    embedded = words + positions + params[f"{names}.token_type_embeddings.weight"][types]
    return _norm(params, f"{names}.LayerNorm", embedded, arch.epsilon)


def _stop_gradient_at(vectors: Array, where: Array) -> Array:
    """The vectors, without a gradient `where` they are the padding token's: torch never trains those."""
    return jnp.where(where, lax.stop_gradient(vectors), vectors)


def _layer(
    weights: Params, arch: Architecture, hidden: Array, attended: Array, keys: Array | None, site: Array
) -> Array:
    """One layer over (rows, length, width); its dropouts are numbered `site` to `site + 2`."""
    mixed = _attention(weights, arch, hidden, attended, keys, site)
    mixed = _dropout(_dense(weights, "attention.output.dense", mixed), keys, site + 1, arch.hidden_dropout)
    hidden = _norm(weights, "attention.output.LayerNorm", hidden + mixed, arch.epsilon)
    wide = _ACTIVATIONS[arch.activation](_dense(weights, "intermediate.dense", hidden))
    narrow = _dropout(_dense(weights, "output.dense", wide), keys, site + 2, arch.hidden_dropout)
    return _norm(weights, "output.LayerNorm", hidden + narrow, arch.epsilon)


def _attention(
    weights: Params, arch: Architecture, hidden: Array, attended: Array, keys: Array | None, site: Array
) -> Array:
    rows, length, width = hidden.shape
    query, key, value = (
        _dense(weights, f"attention.self.{name}", hidden).reshape(rows, length, arch.heads, -1)
        for name in ("query", "key", "value")
    )
    similar = jnp.einsum("rqhd,rkhd->rhqk", query, key, precision=EXACT)
    scaled = similar * (width // arch.heads) ** -0.5
    shares = jax.nn.softmax(jnp.where(attended[:, None, None, :], scaled, -jnp.inf), axis=-1)
    shares = _attention_dropout(shares, keys, site, arch.attention_dropout)
    mixed = jnp.einsum("rhqk,rkhd->rqhd", shares, value, precision=EXACT)
    return mixed.reshape(rows, length, width)


def _head(params: Params, arch: Architecture, first: Array, keys: Array | None) -> Array:
    """Logits (rows,) of the first token's vectors (rows, width), in fp32."""
    if arch.kind == "bert":
        first = jnp.tanh(_dense(params, "bert.pooler.dense", first))
        out = "classifier"
    else:
        first = _dropout(first, keys, _HEAD, arch.head_dropout)
        first = jnp.tanh(_dense(params, "classifier.dense", first))
        out = "classifier.out_proj"
    first = _dropout(first, keys, _HEAD_OUT, arch.head_dropout)
    return _dense(params, out, first)[:, 0]


def _dense(params: Params, name: str, x: Array) -> Array:
    product = jnp.einsum("...i,oi->...o", x, params[f"{name}.weight"], precision=EXACT)
    return product + params[f"{name}.bias"]


def _norm(params: Params, name: str, x: Array, epsilon: float) -> Array:
    centred = x - x.mean(axis=-1, keepdims=True)
    scale = lax.rsqrt((centred**2).mean(axis=-1, keepdims=True) + epsilon)
    return centred * scale * params[f"{name}.weight"] + params[f"{name}.bias"]


def _dropout(x: Array, keys: Array | None, site: int | Array, rate: float) -> Array:
    """Drops of (rows, ...) at one site of the pass. Bits are counted from a row's start, so padding changes none."""
    if keys is None or rate == 0.0:
        return x
    kept = jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, site), 1.0 - rate, x.shape[1:]))(keys)
    return jnp.where(kept, x / (1.0 - rate), 0.0)


def _attention_dropout(shares: Array, keys: Array | None, site: Array, rate: float) -> Array:
    """Drops of (rows, heads, length, length), with a key for each head and query: the length then moves no bit."""
    if keys is None or rate == 0.0:
        return shares
    rows, heads, length, _ = shares.shape
    at_site = jax.vmap(lambda key: jax.random.fold_in(key, site))(keys)
    by_head = jax.vmap(lambda key: jax.vmap(lambda head: jax.random.fold_in(key, head))(jnp.arange(heads)))(at_site)
    by_query = jax.vmap(lambda key: jax.vmap(lambda query: jax.random.fold_in(key, query))(jnp.arange(length)))(
        by_head.reshape(-1)
    )
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - rate, (length,)))(by_query.reshape(-1))
    return jnp.where(kept.reshape(rows, heads, length, length), shares / (1.0 - rate), 0.0)
