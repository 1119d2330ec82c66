"""JAX's passes and steps against torch's on the same weights, and eight devices against one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax import monitoring
from numpy.typing import NDArray
from wording import raises_naming

from cappy.errors import ConfigError
from cappy.records.instance import Source
from cappy.scoring import Scorer
from cappy.training.checkpoint import TrainingState
from cappy.training.corpus import Corpus, CorpusWriter, TrainingInstance
from cappy.training.distributed import SINGLE_RANK, ReplicatedStrategy
from cappy.training.feed import DrawnInstance, comparison_mask, draw_batch, split_batch
from cappy.training.finetuning import FinetuningConfig
from cappy.training.losses import Pairs, instance_losses
from cappy.training.tpu.encoder import parse_architecture, unstack
from cappy.training.tpu.strategy import JaxModel, JaxStrategy, Shapes, find_devices
from cappy.training.update import _is_out_of_memory, run_update

Load = Callable[..., Scorer]
Plan = Callable[..., FinetuningConfig]
WORDS = "cat dog bird mat tree blue red one two three".split()
SETTINGS = {"batch_tokens": 448, "listwise": 0.5, "clip": 1.0}
INSTANCES = 8


def groups(count: int) -> list[TrainingInstance]:
    """Instances of 3 to 6 responses and 4 to 12 words, of which the last response may not be picked."""
    made = []
    for number in range(count):
        words = [WORDS[(number * 3 + place) % 10] for place in range(4 + number * 5 % 9)]
        size = 3 + number % 4
        responses = tuple(WORDS[(number + place) % 10] for place in range(size))
        labels = tuple(round(((number + 2) * (place + 1) % 7) / 7, 3) for place in range(size - 1))
        sources: list[Source] = ["llm"] * size
        made.append(
            TrainingInstance(" ".join(words), responses, (*labels, 0.0), (*[True] * (size - 1), False), tuple(sources))
        )
    return made


PAIRS = [(group.instruction, response) for group in groups(12) for response in group.responses]


@pytest.fixture
def corpus_of(tmp_path: Path) -> Callable[[Scorer], Corpus]:
    def make(scorer: Scorer) -> Corpus:
        folder = tmp_path / "corpus"
        if not folder.is_dir():
            with CorpusWriter(folder, scorer.encoder, len(scorer.tokenizer)) as writer:
                writer.add([(str(number), group) for number, group in enumerate(groups(2 * INSTANCES))])
        return Corpus(folder, scorer.encoder)

    return make


def drawn_of(corpus: Corpus, settings: FinetuningConfig, number: int = 0) -> list[DrawnInstance]:
    return draw_batch(corpus, number, INSTANCES, settings.max_candidates, seed=settings.seed)


def updated(
    scorer: Scorer, strategy: Any, corpus: Corpus, settings: FinetuningConfig, number: int = 0, rate: float = 1e-3
) -> float:
    state = TrainingState(budget=settings.batch_tokens, update=number, running_loss=1.0)
    drawn = drawn_of(corpus, settings, number)
    return run_update(scorer, strategy, corpus, drawn, settings, state, rate=rate, world=SINGLE_RANK)


def apart(result: dict[str, NDArray[Any]], expected: dict[str, NDArray[Any]]) -> float:
    """The largest distance of two arrays of a name, as a share of the expected one's norm."""
    assert result.keys() == expected.keys()
    total = np.sqrt(sum((array**2).sum() for array in expected.values()))
    worst = 0.0
    for name, array in expected.items():
        size = float(np.linalg.norm(array))
        # The gradient of the keys' biases is 0 but for rounding: a softmax does not see them.
        worst = max(worst, float(np.linalg.norm(result[name] - array)) / max(size, 1e-6 * total))
    return worst


def test_scores_are_torchs(load: Load, plan: Plan) -> None:
    scorer = load()
    pad = scorer.tokenizer.pad_token
    pairs = [*PAIRS, ("cat dog " * 20, "red blue"), (f"cat {pad} dog", f"red {pad}")]
    assert len(scorer.encoder.encode(pairs[-2:])[0].ids) > 32
    assert scorer.tokenizer.pad_token_id in scorer.encoder.encode(pairs[-1:])[0].ids
    expected = np.array(scorer.score(pairs))
    JaxStrategy(scorer, plan(**SETTINGS))
    assert isinstance(scorer.model, JaxModel)
    worst = np.abs(np.array(scorer.score(pairs)) - expected).max()
    print(f"scores differ by at most {worst:.1e}")
    assert worst < 1e-4


def test_the_built_in_scorer_scores_as_in_torch(plan: Plan) -> None:
    scorer = Scorer.load("builtin:tiny", device="cpu", precision="fp32")
    expected = scorer.score(PAIRS[:20])
    JaxStrategy(scorer, plan())
    assert scorer.score(PAIRS[:20]) == pytest.approx(expected, abs=1e-4)


def test_first_gradients_are_torchs_and_compare_what_a_selector_may_pick(
    load: Load, plan: Plan, corpus_of: Callable[[Scorer], Corpus]
) -> None:
    scorer, settings = load(), plan(**SETTINGS)
    corpus = corpus_of(scorer)
    assert len(split_batch(drawn_of(corpus, settings), settings.batch_tokens)) > 1
    losses = [_by_hand(scorer, corpus, drawn, settings) for drawn in drawn_of(corpus, settings)]
    torch.stack(losses).mean().backward()
    expected = {name: p.grad.numpy() for name, p in scorer.model.named_parameters()}
    strategy = JaxStrategy(scorer, settings)
    loss = updated(scorer, strategy, corpus, settings)
    assert loss == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
    result = unstack(strategy.engine.gradient_sums)
    # Of these the true gradient is 0: both have nothing but rounding.
    for name in [name for name in expected if name.endswith("self.key.bias")]:
        assert np.abs(result.pop(name)).max() < 1e-4
        assert np.abs(expected.pop(name)).max() < 1e-4
    worst = apart(result, expected)
    print(f"gradients differ by at most {worst:.1e} of an array's norm")
    assert worst < 1e-3


def _by_hand(scorer: Scorer, corpus: Corpus, drawn: DrawnInstance, settings: FinetuningConfig) -> torch.Tensor:
    """One instance's loss in torch; what a selector may not pick takes no part in the comparisons."""
    labels = torch.tensor(corpus.labels(drawn.index, drawn.responses))
    compared = comparison_mask(drawn.responses, corpus.selectable(drawn.index))
    assert not all(compared), "or nothing would be left out"
    scorer.model.eval()
    pairs = Pairs(
        logits=scorer.training_logits(corpus.pairs(drawn.index, drawn.responses)),
        labels=labels,
        groups=torch.zeros(len(labels), dtype=torch.long),
        count=1,
        compared=torch.tensor(compared),
    )
    return instance_losses(pairs, scorer.head, settings)[0]


def test_steps_are_torchs_adamw_and_its_state_can_be_taken_over(
    bert: Load, plan: Plan, corpus_of: Callable[[Scorer], Corpus]
) -> None:
    settings = plan(**{**SETTINGS, "weight_decay": 0.1, "clip": 0.5})
    ours, theirs = bert(), bert()
    corpus = corpus_of(ours)
    strategy, expected = JaxStrategy(ours, settings), ReplicatedStrategy(theirs.model, settings, SINGLE_RANK)
    for number in range(3):
        for scorer, one in ((ours, strategy), (theirs, expected)):
            updated(scorer, one, corpus, settings, number)
    mine, other = strategy.moments(), expected.moments()
    assert mine.keys() == other.keys()
    assert {float(mine[name]) for name in mine if name.endswith(".step")} == {3.0}
    for result, wanted in ((strategy.weights(), expected.weights()), (mine, other)):
        for name in result:
            if "self.key.bias" not in name:  # Adam makes a step of the rounding that its gradient is.
                assert (result[name] - wanted[name]).abs().max() < 1e-4, name
    again = JaxStrategy(bert(), settings)
    again.restore(strategy.weights(), mine)
    assert all(torch.equal(tensor, mine[name]) for name, tensor in again.moments().items())
    assert all(torch.equal(tensor, strategy.weights()[name]) for name, tensor in again.weights().items())


def test_eight_devices_compute_what_one_does_dropout_included(
    bert: Load, plan: Plan, corpus_of: Callable[[Scorer], Corpus]
) -> None:
    results = []
    for count in (1, 8):
        scorer, settings = bert(dropout=0.1), plan(**{**SETTINGS, "batch_tokens": 2048}, devices=count)
        strategy, corpus = JaxStrategy(scorer, settings), corpus_of(scorer)
        first = updated(scorer, strategy, corpus, settings, 0)
        gradients = unstack(strategy.engine.gradient_sums)
        results.append((first, updated(scorer, strategy, corpus, settings, 1), gradients))
    spread = strategy.engine  # Of the last, on eight devices: an eighth of the rows on each, and all parameters.
    rows: Any = spread.to_devices(np.zeros((16, 32), np.int32))  # type: ignore[arg-type]
    assert {shard.data.shape for shard in rows.addressable_shards} == {(2, 32)}
    for array in (rows, *spread.params.values(), *spread.gradient_sums.values()):
        assert len(array.sharding.device_set) == 8
        assert array.is_fully_replicated == (array is not rows)
    (first, second, gradients), (other_first, other_second, other_gradients) = results
    assert (other_first, other_second) == pytest.approx((first, second), rel=1e-5)
    total = np.sqrt(sum((array**2).sum() for array in gradients.values()))
    worst = max(float(np.abs(gradients[name] - other_gradients[name]).max()) for name in gradients) / total
    print(f"1 and 8 devices: gradients differ by at most {worst:.1e} of their norm")
    assert worst < 1e-5


def test_dropout_does_not_depend_on_padding_or_on_how_a_pass_is_cut(bert: Load, plan: Plan) -> None:
    result = []
    for tokens in (64, 256):
        scorer = bert(dropout=0.1)
        JaxStrategy(scorer, plan(batch_tokens=tokens))
        encoded = scorer.encoder.encode([PAIRS[0], ("cat dog " * 15, "red"), *PAIRS[4:6]])
        scorer.model.train()
        torch.manual_seed(3)
        result.append(scorer.training_logits(encoded).detach().numpy())
    np.testing.assert_allclose(result[0], result[1], atol=1e-4)
    # Alone, the first pair is padded to its own length and not to the longest's.
    torch.manual_seed(3)
    assert scorer.training_logits(encoded[:1]).detach().numpy()[0] == pytest.approx(result[1][0], abs=1e-4)
    scorer.model.eval()
    assert np.abs(result[1] - scorer.training_logits(encoded).numpy()).min() > 1e-4, "or there was no dropout"


def test_the_padding_tokens_vectors_are_not_trained(bert: Load, plan: Plan, tmp_path: Path) -> None:
    scorer, settings = bert(), plan(**SETTINGS)
    pad = scorer.tokenizer.pad_token
    with CorpusWriter(tmp_path / "corpus", scorer.encoder, len(scorer.tokenizer)) as writer:
        writer.add(
            [
                (
                    "0",
                    TrainingInstance(
                        f"cat {pad} dog", (f"red {pad}", "blue"), (1.0, 0.0), (True, True), ("llm", "llm")
                    ),
                )
            ]
        )
    strategy = JaxStrategy(scorer, settings)
    updated(scorer, strategy, Corpus(tmp_path / "corpus", scorer.encoder), settings)
    gradients = unstack(strategy.engine.gradient_sums)
    table = next(g for name, g in gradients.items() if name.endswith("word_embeddings.weight"))
    assert not table[scorer.tokenizer.pad_token_id].any()
    assert table.any()


def test_shapes_seen_before_are_not_compiled_again(
    bert: Load, plan: Plan, corpus_of: Callable[[Scorer], Corpus]
) -> None:
    compiled: list[str] = []

    def count(event: str, duration_secs: float, **rest: str | int) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    scorer, settings = bert(), plan(**SETTINGS)
    strategy, corpus = JaxStrategy(scorer, settings), corpus_of(scorer)
    monitoring.register_event_duration_secs_listener(count)
    for number in (0, 1):
        updated(scorer, strategy, corpus, settings, number)
    assert compiled
    compiled.clear()
    for number in (0, 1):
        strategy.restore(strategy.weights(), strategy.moments())
        updated(scorer, strategy, corpus, settings, number)
    assert compiled == []


def test_weights_go_back_into_the_folder_unchanged(bert: Load, plan: Plan, tmp_path: Path) -> None:
    scorer = bert()
    strategy, before = JaxStrategy(scorer, plan()), scorer.model
    weights = strategy.weights()
    scorer.model = strategy.best_model(weights).eval()
    assert scorer.model is not before
    scorer.save(tmp_path / "scorer")
    assert Scorer.load(str(tmp_path / "scorer"), device="cpu", precision="fp32").score(PAIRS[:4]) == pytest.approx(
        bert().score(PAIRS[:4])
    )
    assert weights.keys() == bert().model.state_dict().keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in bert().model.state_dict().items())


def test_jax_says_that_memory_ran_out_as_the_loop_understands_it() -> None:
    with pytest.raises(RuntimeError) as short:
        jnp.zeros(2**45).block_until_ready()
    assert _is_out_of_memory(short.value)


@pytest.mark.parametrize(
    ("name", "changed", "named"),
    [
        ("DebertaV2ForSequenceClassification", {}, ("RobertaForSequenceClassification", "'DebertaV2")),
        ("BertForSequenceClassification", {"hidden_act": "silu"}, ("config.json: hidden_act:", "'silu'")),
        ("BertForSequenceClassification", {"num_labels": 3}, ("config.json: num_labels:", "got 3")),
        ("BertForSequenceClassification", {"is_decoder": True}, ("config.json: is_decoder:", "got True")),
    ],
)
def test_encoders_without_a_build_are_refused_in_one_line(
    bert_folder: Path, name: str, changed: dict[str, Any], named: tuple[str, ...]
) -> None:
    config = Scorer.load(str(bert_folder), device="cpu").model.config
    values: Any = {**config.to_dict(), "num_labels": 1, **changed}
    with raises_naming(ConfigError, "--parallelism jax", *named, "--parallelism single") as refused:
        parse_architecture(name, values)
    assert "\n" not in str(refused.value)


def test_a_length_beyond_the_positions_is_refused(bert: Load, plan: Plan) -> None:
    scorer = bert()
    scorer.encoder.max_length = 66
    with raises_naming(ConfigError, "--parallelism jax:", "66 tokens", "--max-length 6"):
        JaxStrategy(scorer, plan())


def test_more_devices_than_there_are_are_refused() -> None:
    assert len(jax.devices()) == 8
    with raises_naming(ConfigError, "--devices 9:", "cpu", "--devices 8"):
        find_devices(9)


def shapes(**values: int) -> Shapes:
    return Shapes(**{"longest": 200, "tokens": 512, "devices": 1, **values})


def test_lengths_double_up_to_the_scorers_own() -> None:
    assert shapes().lengths == (32, 64, 128, 200)
    assert shapes(longest=512).lengths == (32, 64, 128, 256, 512)
    assert shapes(longest=32).lengths == (32,)
    assert shapes(longest=20).lengths == (20,)
    assert [shapes().length_of(tokens) for tokens in (1, 32, 33, 200)] == [32, 32, 64, 200]


@pytest.mark.parametrize("devices", [1, 3, 8])
@pytest.mark.parametrize("tokens", [64, 512, 8192])
def test_pieces_hold_every_pair_once_in_few_shapes_within_the_budget(devices: int, tokens: int) -> None:
    given = shapes(tokens=tokens, devices=devices)
    for length in given.lengths:
        seen = set()
        for pairs in (1, 2, 3, 7, 16, 100, 333):
            covered: list[int] = []
            for own, count in given.chunks(pairs, length):
                covered += range(own.start, own.stop)
                assert own.stop - own.start <= count
                assert count % devices == 0
                assert count == devices or (count - devices) * length < tokens
                seen.add(count)
            assert covered == list(range(pairs))
        assert len(seen) <= 3
