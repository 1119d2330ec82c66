"""BERT and RoBERTa in JAX, with a classification head of one label, as a pure function of a dict of arrays.

The arrays are converted from a torch model and back. They keep the names of the scorer folder, except that the layers'
arrays are stacked: `bert.encoder.layer.*.x` has shape (layers, ...) and holds every `bert.encoder.layer.N.x`, so that
XLA compiles one layer only.

Shapes: `hidden` is (rows, length, width), `attended` (the attention mask) is (rows, length), and the attention `probs`
are (rows, heads, length, length). In the einsums, r is rows, q and k are the positions of queries and keys, h is heads,
d is the width per head, and i and o are a dense layer's inputs and outputs.
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
"""Precision of matrix products: by default a TPU multiplies fp32 arrays in bf16."""
_LAYER = re.compile(r"^(\w+\.encoder\.layer\.)(\d+)\.(.+)$")
# Indices of the dropout sites of one pass; layer n has sites 3 n + 3 to 3 n + 5.
_EMBEDDINGS_SITE, _HEAD_INPUT_SITE, _HEAD_OUTPUT_SITE, _FIRST_LAYER_SITE = range(4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """The part of a model's configuration that the forward pass needs.

    `positions` is the maximum length of a pair in tokens, `pad` the padding token's id, `epsilon` the layer norm's.
    """

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
        """The prefix of the names of the layers' stacked arrays."""
        return f"{self.kind}.encoder.layer.*."


class EncoderConfig(TypedDict, total=False):
    """The fields of a transformers configuration that are read here."""

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
    """The architecture of a model class with this configuration; raises ConfigError if it is not supported."""
    if name not in ARCHITECTURES:
        raise ConfigError(
            f"--parallelism jax: supports {' and '.join(ARCHITECTURES)}, got {quote(name)}; give --parallelism single"
        )
    kind = ARCHITECTURES[name]
    for field, supported in (("hidden_act", tuple(_ACTIVATIONS)), ("is_decoder", (False,)), ("num_labels", (1,))):
        value = config.get(field, supported[0])
        if value not in supported:
            allowed = " or ".join(map(str, supported))
            remedy = "give --parallelism single"
            raise ConfigError(
                f"config.json: {field}: --parallelism jax supports {allowed}, got {quote(value)}; {remedy}"
            )
    head_dropout = config.get("classifier_dropout")
    return Architecture(
        kind=kind,
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        # RoBERTa's first position is the padding token's id + 1.
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
    """Logits (rows,) in fp32 of token ids and token types (rows, length); `lengths` (rows,) excludes the padding.

    `keys` (rows,) are the dropout keys of the rows, None for no dropout. A row's dropout depends only on its key, not
    on its index, its padding or the other rows.
    """
    attended = jnp.arange(ids.shape[1]) < lengths[:, None]
    hidden = _embed(params, arch, ids, types)
    hidden = _dropout(hidden, keys, _EMBEDDINGS_SITE, arch.hidden_dropout)
    stacked = {
        name.removeprefix(arch.stack_prefix): array
        for name, array in params.items()
        if name.startswith(arch.stack_prefix)
    }

    def layer(hidden: Array, weights_and_index: tuple[Params, Array]) -> tuple[Array, None]:
        weights, index = weights_and_index
        return _layer(weights, arch, hidden, attended, keys, 3 * index + _FIRST_LAYER_SITE), None

    hidden, _ = lax.scan(layer, hidden, (stacked, jnp.arange(arch.layers)))
    return _head(params, arch, hidden[:, 0], keys)


def stack(tensors: Arrays) -> Arrays:
    """Stacks every layer's `x.encoder.layer.N.y` as `x.encoder.layer.*.y`, (layers, ...); keeps the other arrays."""
    stacked: Arrays = {}
    layers: dict[str, dict[int, NDArray[np.float32]]] = {}
    for name, tensor in tensors.items():
        if match := _LAYER.match(name):
            layers.setdefault(f"{match[1]}*.{match[3]}", {})[int(match[2])] = tensor
        else:
            stacked[name] = tensor
    return stacked | {
        name: np.stack([by_index[index] for index in sorted(by_index)]) for name, by_index in layers.items()
    }


def unstack(params: Params) -> Arrays:
    """The inverse of `stack`: copies to the host, one array per name of the scorer folder, each with its own memory."""
    tensors: Arrays = {}
    for name, array in params.items():
        values = np.array(array)
        if ".*." in name:
            tensors |= {name.replace("*", str(index), 1): value.copy() for index, value in enumerate(values)}
        else:
            tensors[name] = values
    return tensors


def from_torch(tensors: Mapping[str, Tensor]) -> Arrays:
    """Copies torch tensors to fp32 arrays; without the copy JAX may share memory with the model."""
    return {name: np.array(tensor.detach().float().cpu().numpy()) for name, tensor in tensors.items()}


def to_torch(arrays: Arrays) -> dict[str, Tensor]:
    """Torch tensors that share the arrays' memory."""
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def decay_mask(params: Arrays, arch: Architecture) -> dict[str, bool]:
    """Whether each array has weight decay: not biases and norms, which have one dimension in the scorer folder."""
    return {name: array.ndim - name.startswith(arch.stack_prefix) >= 2 for name, array in params.items()}


def _embed(params: Params, arch: Architecture, ids: Array, types: Array) -> Array:
    prefix = f"{arch.kind}.embeddings"
    padding = (ids == arch.pad)[:, :, None]
    word_vectors = _stop_gradient_at(params[f"{prefix}.word_embeddings.weight"][ids], padding)
    table = params[f"{prefix}.position_embeddings.weight"]
    if arch.kind == "roberta":
        is_token = (ids != arch.pad).astype(jnp.int32)
        positions = _stop_gradient_at(table[jnp.cumsum(is_token, axis=1) * is_token + arch.pad], padding)
    else:
        positions = table[jnp.arange(ids.shape[1])]
    embedded = word_vectors + positions + params[f"{prefix}.token_type_embeddings.weight"][types]
    return _norm(params, f"{prefix}.LayerNorm", embedded, arch.epsilon)


def _stop_gradient_at(vectors: Array, is_padding: Array) -> Array:
    """Stops the gradient of the padding token's vectors, which torch does not train either."""
    return jnp.where(is_padding, lax.stop_gradient(vectors), vectors)


def _layer(
    weights: Params, arch: Architecture, hidden: Array, attended: Array, keys: Array | None, site: Array
) -> Array:
    """One layer on hidden (rows, length, width); its dropout sites are `site` to `site + 2`."""
    context = _attention(weights, arch, hidden, attended, keys, site)
    context = _dropout(_dense(weights, "attention.output.dense", context), keys, site + 1, arch.hidden_dropout)
    hidden = _norm(weights, "attention.output.LayerNorm", hidden + context, arch.epsilon)
    intermediate = _ACTIVATIONS[arch.activation](_dense(weights, "intermediate.dense", hidden))
    output = _dropout(_dense(weights, "output.dense", intermediate), keys, site + 2, arch.hidden_dropout)
    return _norm(weights, "output.LayerNorm", hidden + output, arch.epsilon)


def _attention(
    weights: Params, arch: Architecture, hidden: Array, attended: Array, keys: Array | None, site: Array
) -> Array:
    rows, length, width = hidden.shape
    query, key, value = (
        _dense(weights, f"attention.self.{name}", hidden).reshape(rows, length, arch.heads, -1)
        for name in ("query", "key", "value")
    )
    scores = jnp.einsum("rqhd,rkhd->rhqk", query, key, precision=EXACT)
    scaled = scores * (width // arch.heads) ** -0.5
    probs = jax.nn.softmax(jnp.where(attended[:, None, None, :], scaled, -jnp.inf), axis=-1)
    probs = _attention_dropout(probs, keys, site, arch.attention_dropout)
    context = jnp.einsum("rhqk,rkhd->rqhd", probs, value, precision=EXACT)
    return context.reshape(rows, length, width)


def _head(params: Params, arch: Architecture, pooled: Array, keys: Array | None) -> Array:
    """Logits (rows,) in fp32 from the first token's vectors (rows, width)."""
    if arch.kind == "bert":
        pooled = jnp.tanh(_dense(params, "bert.pooler.dense", pooled))
        out = "classifier"
    else:
        pooled = _dropout(pooled, keys, _HEAD_INPUT_SITE, arch.head_dropout)
        pooled = jnp.tanh(_dense(params, "classifier.dense", pooled))
        out = "classifier.out_proj"
    pooled = _dropout(pooled, keys, _HEAD_OUTPUT_SITE, arch.head_dropout)
    return _dense(params, out, pooled)[:, 0]


def _dense(params: Params, name: str, x: Array) -> Array:
    product = jnp.einsum("...i,oi->...o", x, params[f"{name}.weight"], precision=EXACT)
    return product + params[f"{name}.bias"]


def _norm(params: Params, name: str, x: Array, epsilon: float) -> Array:
    centred = x - x.mean(axis=-1, keepdims=True)
    scale = lax.rsqrt((centred**2).mean(axis=-1, keepdims=True) + epsilon)
    return centred * scale * params[f"{name}.weight"] + params[f"{name}.bias"]


def _dropout(x: Array, keys: Array | None, site: int | Array, rate: float) -> Array:
    """Dropout of (rows, ...) at one site. A row's bits start at its first token and do not depend on its padding."""
    if keys is None or rate == 0.0:
        return x
    keep = jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, site), 1.0 - rate, x.shape[1:]))(keys)
    return jnp.where(keep, x / (1.0 - rate), 0.0)


def _attention_dropout(probs: Array, keys: Array | None, site: Array, rate: float) -> Array:
    """Dropout of (rows, heads, length, length); a key per head and query makes the bits independent of the length."""
    if keys is None or rate == 0.0:
        return probs
    rows, heads, length, _ = probs.shape
    site_keys = jax.vmap(lambda key: jax.random.fold_in(key, site))(keys)
    head_keys = jax.vmap(lambda key: jax.vmap(lambda head: jax.random.fold_in(key, head))(jnp.arange(heads)))(site_keys)
    query_keys = jax.vmap(lambda key: jax.vmap(lambda query: jax.random.fold_in(key, query))(jnp.arange(length)))(
        head_keys.reshape(-1)
    )
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - rate, (length,)))(query_keys.reshape(-1))
    return jnp.where(keep.reshape(rows, heads, length, length), probs / (1.0 - rate), 0.0)
