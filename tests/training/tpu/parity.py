"""JAX against torch on the same weights: scores, losses, gradients, ten updates, and the way back into the folder."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from cases import copy_groups, pairs_of, plan, without_dropout
from numpy.typing import NDArray
from safetensors.torch import load_file

from cappy.errors import ConfigError
from cappy.scoring import Scorer
from cappy.training import loop as torch_loop
from cappy.training.feed import Group, batches
from cappy.training.losses import instance_losses as torch_losses
from cappy.training.plan import rate
from cappy.training.tpu.encoder import architecture
from cappy.training.tpu.engine import Engine
from cappy.training.tpu.loop import new_engine, new_exam, prepare, shapes_of
from cappy.training.tpu.losses import instance_losses
from cappy.training.tpu.weights import into_model, stack, unstack

Load = Callable[[], Scorer]
GROUPS = copy_groups(24)
WEIGHTS = {"relative": 4.0, "listwise": 0.5}


def jax_scores(scorer: Scorer, groups: Sequence[Group], compute: str = "float32") -> NDArray[np.float32]:
    settings = plan()
    engine = new_engine(scorer, settings, devices=jax.devices()[:1], compute=compute)  # type: ignore[arg-type]
    exam = new_exam(scorer, groups, shapes_of(scorer, settings, devices=1))
    scores = np.empty(sum(len(chosen) for chosen, _ in exam.batches), np.float32)
    for chosen, tokens in exam.batches:
        scores[chosen] = engine.scores(tokens)[: len(chosen)]
    return scores


def difference(scorer: Scorer, groups: Sequence[Group], compute: str = "float32") -> float:
    expected = scorer.score(list(dict.fromkeys(pairs_of(groups))))
    return float(np.abs(jax_scores(scorer, groups, compute) - np.array(expected, np.float32)).max())


def test_scores_are_torchs(load: Load) -> None:
    worst = difference(load(), GROUPS)
    print(f"scores differ by at most {worst:.1e}")
    assert worst < 1e-4


def test_the_built_in_scorer_scores_as_in_torch_and_in_bfloat16_nearly() -> None:
    scorer = Scorer.load("builtin", device="cpu")
    groups = copy_groups(6)
    print(f"built-in: {difference(scorer, groups):.1e}, in bfloat16 {difference(scorer, groups, 'bfloat16'):.1e}")
    assert difference(scorer, groups) < 1e-4
    assert 0 < difference(scorer, groups, "bfloat16") < 2e-2


def test_a_padding_token_inside_a_text_is_read_as_torch_reads_it(load: Load) -> None:
    scorer = load()
    pad = scorer.tokenizer.pad_token
    groups = [Group(f"cat {pad} dog", (f"red {pad}", "blue"), (1.0, 0.0), (True, True))]
    assert scorer.tokenizer.pad_token_id in scorer.encoder.encode(pairs_of(groups))[0].ids
    assert difference(scorer, groups) < 1e-4


@pytest.mark.parametrize("head", ["bce", "mse"])
def test_losses_and_their_gradients_are_torchs(head: str) -> None:
    generator = np.random.default_rng(0)
    logits = np.append(generator.normal(size=20) * 3, [0.0, 40.0, -40.0]).astype(np.float32)
    labels = generator.random(23).astype(np.float32)
    groups = np.sort(generator.integers(0, 5, 23)).astype(np.int32)
    leaf = torch.tensor(logits, requires_grad=True)
    expected = torch_losses(leaf, torch.tensor(labels), torch.tensor(groups).long(), 5, head=head, **WEIGHTS)
    expected.sum().backward()  # type: ignore[no-untyped-call]

    def total(values: jax.Array) -> tuple[jax.Array, jax.Array]:
        # A sixth group has no pairs.
        losses = instance_losses(values, jnp.array(labels), jnp.array(groups), 6, head=head, **WEIGHTS)
        return losses.sum(), losses

    gradient, losses = jax.grad(total, has_aux=True)(jnp.array(logits))
    assert leaf.grad is not None
    np.testing.assert_allclose(losses, [*expected.detach().numpy(), 0.0], rtol=1e-5)
    np.testing.assert_allclose(gradient, leaf.grad.numpy(), rtol=1e-4, atol=1e-6)


def test_first_gradients_are_torchs(load: Load) -> None:
    scorer, settings = without_dropout(load()), plan(clip=1e9, **WEIGHTS)
    engine, batch = _engine(scorer, settings), GROUPS[:8]
    update = prepare(scorer, batch, settings, shapes_of(scorer, settings, devices=1))
    loss = float(engine.accumulate(update.batches, instances=8, seed=0))
    optimizer = torch_loop._optimizer(scorer, settings)
    assert loss == pytest.approx(torch_loop._update(scorer, optimizer, batch, settings, 0), rel=1e-5)
    gradients = engine.gradients()
    expected = {name: p.grad.numpy() for name, p in scorer.model.named_parameters() if p.grad is not None}
    assert gradients.keys() == expected.keys()
    total = np.sqrt(sum((g**2).sum() for g in expected.values()))
    worst = 0.0
    for name, gradient in gradients.items():
        size = np.linalg.norm(expected[name])
        # The gradient of the keys' biases is 0 but for rounding: a softmax does not see them.
        if size > 1e-6 * total:
            worst = max(worst, float(np.linalg.norm(gradient - expected[name]) / size))
        else:
            assert np.linalg.norm(gradient) < 1e-5 * total, name
    print(f"gradients differ by at most {worst:.1e} of an array's norm")
    assert worst < 1e-3


def test_the_padding_tokens_vectors_are_trained_in_neither(load: Load) -> None:
    scorer, settings = load(), plan()
    pad = scorer.tokenizer.pad_token
    batch = [Group(f"cat {pad} dog", (f"red {pad}", "blue"), (1.0, 0.0), (True, True))]
    engine = _engine(scorer, settings)
    update = prepare(scorer, batch, settings, shapes_of(scorer, settings, devices=1))
    engine.accumulate(update.batches, instances=1, seed=0)
    table = next(g for name, g in engine.gradients().items() if name.endswith("word_embeddings.weight"))
    assert not table[scorer.tokenizer.pad_token_id].any()
    assert table.any()


def test_ten_updates_follow_torchs_loss_curve(load: Load) -> None:
    settings = plan(batch_tokens=2048, clip=1.0, weight_decay=0.1, **WEIGHTS)
    ours, theirs = without_dropout(load()), without_dropout(load())
    engine, shapes = _engine(ours, settings), shapes_of(ours, settings, devices=1)
    optimizer = torch_loop._optimizer(theirs, settings)
    # One shape is enough here, and compiles once.
    short = copy_groups(24, longest=5)
    order = [batch for epoch in range(4) for batch in batches(short, 8, 6, seed=0, epoch=epoch)][:10]
    curve: list[tuple[float, float]] = []
    for number, batch in enumerate(order):
        step = rate(number, 10, 1e-3, 0.2)
        update = prepare(ours, batch, settings, shapes)
        loss = float(engine.update(update.batches, instances=len(batch), rate=step, seed=number))
        for group in optimizer.param_groups:
            group["lr"] = step
        curve.append((loss, torch_loop._update(theirs, optimizer, batch, settings, number)))
    worst = max(abs(a - b) for a, b in curve)
    print(f"losses {curve[0][0]:.4f} to {curve[-1][0]:.4f} differ by at most {worst:.1e}")
    assert worst < 1e-3
    into_model(ours.model, engine.weights())
    pairs = pairs_of(short)
    assert ours.score(pairs) == pytest.approx(theirs.score(pairs), abs=1e-3)


def test_weights_go_back_into_the_folder_unchanged(load: Load, tmp_path: Path) -> None:
    scorer = load()
    scorer.write(tmp_path / "before")
    engine = _engine(scorer, plan())
    with torch.no_grad():
        for parameter in scorer.model.parameters():
            parameter.zero_()
    into_model(scorer.model, engine.weights())
    scorer.write(tmp_path / "after")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("before", "after"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    pairs = pairs_of(GROUPS[:4])
    assert Scorer.load(str(tmp_path / "after"), device="cpu").score(pairs) == load().score(pairs)


def test_layers_are_stacked_in_the_order_of_their_numbers() -> None:
    tensors = {f"bert.encoder.layer.{n}.x.weight": np.full((2, 3), n, np.float32) for n in (10, 2, 0, *range(3, 10), 1)}
    stacked = stack(tensors)
    assert stacked["bert.encoder.layer.*.x.weight"][:, 0, 0].tolist() == list(range(11))
    assert all(np.array_equal(unstack(stacked)[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("DebertaV2ForSequenceClassification", {}, "BertForSequenceClassification and RobertaForSequenceClassif"),
        ("BertForSequenceClassification", {"hidden_act": "silu"}, "config.json: hidden_act: .* got 'silu'"),
        ("BertForSequenceClassification", {"num_labels": 3}, "config.json: num_labels: .* got 3"),
        ("BertForSequenceClassification", {"is_decoder": True}, "config.json: is_decoder: .* got True"),
    ],
)
def test_other_architectures_are_refused_in_one_line(
    load: Load, name: str, changed: dict[str, Any], message: str
) -> None:
    config = load().model.config
    with pytest.raises(ConfigError, match=message) as refused:
        architecture(name, {**config.to_dict(), "num_labels": 1, **changed})
    assert "\n" not in str(refused.value)


def test_a_length_beyond_the_positions_is_refused(load: Load) -> None:
    scorer = load()
    scorer.encoder.max_length = 98
    with pytest.raises(ConfigError, match="has 9[67] positions, got 98"):
        _engine(scorer, plan())


def _engine(scorer: Scorer, settings: Any) -> Engine:
    return new_engine(scorer, settings, devices=jax.devices()[:1])
