"""Eight devices: rows are shared out, and nothing that comes out depends on how many there are."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import copy_groups, plan

from cappy.scoring import Scorer
from cappy.training.tpu.encoder import architecture, forward
from cappy.training.tpu.engine import Engine
from cappy.training.tpu.loop import new_engine, prepare, shapes_of
from cappy.training.tpu.weights import from_model

Load = Callable[[], Scorer]
# Lengths of 32 and 64 tokens, and more than one batch per update on one device.
SETTINGS = plan(batch_tokens=600, listwise=0.5, learning_rate=1e-3)
GROUPS = copy_groups(16, longest=20)
KEY = jax.random.key(5)


def engine_on(scorer: Scorer, count: int) -> Engine:
    return new_engine(scorer, SETTINGS, devices=jax.devices()[:count])


def test_there_are_eight_devices() -> None:
    assert len(jax.devices()) == 8


def test_gradients_and_updates_are_the_same_on_one_device_and_on_eight(load: Load) -> None:
    results = []
    for count in (1, 8):
        scorer = load()
        engine, shapes = engine_on(scorer, count), shapes_of(scorer, SETTINGS, devices=count)
        update = prepare(scorer, GROUPS[:8], SETTINGS, shapes)
        loss = float(engine.accumulate(update.batches, instances=8, seed=3))
        gradients = engine.gradients()
        engine.update((), instances=8, rate=1e-3, seed=3)
        second = prepare(scorer, GROUPS[8:], SETTINGS, shapes)
        after = float(engine.update(second.batches, instances=8, rate=1e-3, seed=4))
        results.append((loss, after, gradients, len(update.batches)))
    (loss, after, gradients, batches), (other_loss, other_after, other_gradients, other_batches) = results
    assert batches > other_batches, "the rows were batched differently"
    norm = np.sqrt(sum((g**2).sum() for g in gradients.values()))
    worst = max(float(np.abs(gradients[name] - other_gradients[name]).max()) for name in gradients) / norm
    print(f"1 and 8 devices: losses {loss - other_loss:.1e} and {after - other_after:.1e}, gradients {worst:.1e}")
    assert other_loss == pytest.approx(loss, rel=1e-5)
    assert other_after == pytest.approx(after, rel=1e-5)
    assert worst < 1e-5


def test_each_device_holds_an_eighth_of_the_rows_and_all_parameters(load: Load) -> None:
    scorer = load()
    engine = engine_on(scorer, 8)
    update = prepare(scorer, GROUPS[:8], SETTINGS, shapes_of(scorer, SETTINGS, devices=8))
    rows = engine.place(update.batches[0])
    assert {shard.data.shape[0] * 8 for shard in rows.tokens.ids.addressable_shards} == {rows.labels.shape[0]}
    assert len({shard.device for shard in rows.labels.addressable_shards}) == 8
    engine.update(update.batches, instances=8, rate=1e-3, seed=0)
    for array in [*engine.params.values(), *jax.tree.leaves(engine.moments)]:
        assert array.is_fully_replicated
        assert len(array.sharding.device_set) == 8


def test_dropout_depends_on_a_rows_key_and_not_on_padding_or_place(load: Load) -> None:
    model = load().model
    config = {**model.config.to_dict(), "attention_probs_dropout_prob": 0.1, "hidden_dropout_prob": 0.1}
    arch = architecture(type(model).__name__, {**config, "num_labels": 1})
    params = jax.tree.map(jnp.asarray, from_model(model))
    ids = np.random.default_rng(0).integers(4, 200, (4, 20))
    lengths = jnp.array([20, 12, 20, 5])
    keys = jax.vmap(lambda number: jax.random.fold_in(KEY, number))(jnp.arange(4))

    def logits(width: int, order: list[int], keys: jax.Array | None) -> np.ndarray:
        padded = np.full((4, width), arch.pad)
        padded[:, :20] = np.where(np.arange(20) < np.array(lengths)[:, None], ids, arch.pad)
        rows, used = jnp.array(padded)[jnp.array(order)], lengths[jnp.array(order)]
        return np.asarray(forward(params, arch, rows, jnp.zeros_like(rows), used, keys=keys))

    same, turned = [0, 1, 2, 3], [3, 2, 1, 0]
    dropped = logits(20, same, keys)
    np.testing.assert_allclose(logits(32, same, keys), dropped, atol=1e-4)
    np.testing.assert_allclose(logits(32, turned, keys[::-1])[::-1], dropped, atol=1e-4)
    assert np.abs(dropped - logits(20, same, None)).min() > 1e-3
    assert len(set(logits(20, [0, 0, 0, 0], keys).tolist())) == 4, "every key drops differently"
