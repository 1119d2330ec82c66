"""The committed weights are what their seals say, load as they are, and do their work."""

import json
import shutil
from pathlib import Path

import pytest

from cappy.annotation import rouge_l
from cappy.builtin import LLM_FOLDER, TINY_SCORER_FOLDER, verify
from cappy.builtin.tasks import FAMILIES, instances
from cappy.errors import FolderError
from cappy.records import prompt_hash
from cappy.records.folder import verify as verify_manifest
from cappy.sampling import load_generator
from cappy.sampling.strategies import GREEDY, Decoding
from cappy.scoring import Scorer, training_prompts

MOST_BYTES = 12_000_000


def test_the_folders_hold_what_their_seals_name_and_are_small() -> None:
    verify(LLM_FOLDER)
    verify_manifest(TINY_SCORER_FOLDER)
    for folder in (LLM_FOLDER, TINY_SCORER_FOLDER):
        assert sum(path.stat().st_size for path in folder.iterdir()) < MOST_BYTES
        assert (folder / "model.safetensors").is_file()
    seal = json.loads((LLM_FOLDER / "training.json").read_text())
    assert {"command", "seed", "date", "steps", "sha256", "losses", "rouge_l"} <= set(seal)
    assert set(seal["rouge_l"]) == set(FAMILIES)


def test_a_changed_file_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "llm"
    shutil.copytree(LLM_FOLDER, folder)
    (folder / "config.json").write_text("{}")
    with pytest.raises(FolderError, match=r"config\.json: changed"):
        verify(folder)


def test_the_llm_answers_and_there_is_something_to_select() -> None:
    rows = list(instances("adaptation", num_per_family=3, seed=3, families=("word_sorting", "restaurant_description")))
    generator = load_generator("builtin")
    prompts = [row.instruction for row in rows]
    sampled = generator.sample(prompts, [Decoding(name="sampling", num_samples=8)], seed=0)
    greedy = generator.sample(prompts, [GREEDY], seed=0)
    assert all(candidate.logprob_sum is not None and candidate.logprob_sum <= 0 for one in sampled for candidate in one)
    labels = [[rouge_l(row.references, c.response) for c in drawn] for row, drawn in zip(rows, sampled, strict=True)]
    assert sum(map(max, labels)) > sum(sum(given) / len(given) for given in labels)
    assert sum(rouge_l(row.references, one[0].response) for row, one in zip(rows, greedy, strict=True)) > 0


def test_the_scorer_was_trained_on_the_pretraining_pool_alone() -> None:
    hashes = set(training_prompts(TINY_SCORER_FOLDER).tolist())
    assert len(hashes) > 1000
    for pool in ("adaptation", "llm"):
        assert not hashes & {prompt_hash(row.instruction) for row in instances(pool, num_per_family=100)}


def test_the_scorer_prefers_a_reference_to_another_instances_reference() -> None:
    scorer = Scorer.load("builtin:tiny")
    rows = [row for row in instances("adaptation", num_per_family=12, seed=9) if not FAMILIES[row.task].held_out]
    by_task: dict[str, list[int]] = {}
    for row in rows:
        other = next(o for o in rows if o.task == row.task and not set(o.references) & set(row.references))
        right, wrong = scorer.score([(row.instruction, row.references[0]), (row.instruction, other.references[0])])
        by_task.setdefault(row.task, []).append(right > wrong)
    share = sum(map(sum, by_task.values())) / len(rows)
    assert share > 0.75, by_task
