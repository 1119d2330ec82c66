"""Makes the built-in LLM: `python -m cappy.builtin llm --target FOLDER --steps 4500 --seed 0`."""

import json
import os
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from itertools import chain, islice
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn
from transformers import PreTrainedTokenizerFast, T5ForConditionalGeneration

from cappy.builtin.llm_evaluation import evaluate
from cappy.builtin.llm_training import Pair, Recipe, Training, batches, interleave, new_model, spans, train
from cappy.builtin.tasks import instances
from cappy.builtin.tokenizer import train_tokenizer
from cappy.builtin.verification import SEAL, file_hashes, verify
from cappy.records.instance import Instance

_VOCABULARY_SIZE = 2_500
_NUM_TOKENIZER_ROWS = 20_000
NUM_EVALUATION = 40


def make(target: Path, *, steps: int, processes: int, seed: int, num_per_family: int) -> None:
    """Trains tokenizer and LLM on the `llm` pool and writes the folder `target`, sealed.

    One thread each in two processes does more here than two threads in one: the model is too small to split a matrix.
    The weights are stored in float16. The pool's validation split measures each family at the end.
    """
    job = Job(target=target, steps=steps, processes=processes, seed=seed, num_per_family=num_per_family)
    with tempfile.TemporaryDirectory() as folder:
        spawn(_work, args=(job, f"{folder}/rendezvous"), nprocs=processes)  # type: ignore[no-untyped-call]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What every process is told."""

    target: Path
    steps: int
    processes: int
    seed: int
    num_per_family: int
    recipe: Recipe = field(default_factory=Recipe)


def _work(rank: int, job: Job, rendezvous: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=job.processes)
    log = _log if rank == 0 else _silent
    rows = [row for row in instances("llm", num_per_family=job.num_per_family, seed=job.seed) if row.split == "train"]
    texts = [text for row in rows[:_NUM_TOKENIZER_ROWS] for text in (row.instruction, *row.references)]
    tokenizer = train_tokenizer(texts, size=_VOCABULARY_SIZE)
    pairs = encode(rows, tokenizer)
    torch.manual_seed(job.seed)
    model = new_model(job.recipe, vocab_size=len(tokenizer), pad=tokenizer.pad_token_id, end=tokenizer.eos_token_id)
    log(f"{len(pairs)} instances, {model.num_parameters()} parameters")
    mine = pairs[rank :: job.processes]
    feed = batches(mine, size=job.recipe.batch_size, seed=job.seed + rank, pad=tokenizer.pad_token_id)
    copying = spans(
        len(tokenizer), size=job.recipe.batch_size, seed=rank, pad=tokenizer.pad_token_id, end=tokenizer.eos_token_id
    )
    feed = chain(islice(copying, job.recipe.copy_steps), interleave(feed, copying, job.recipe.copy_every))
    training = train(model, feed, job.recipe, steps=job.steps, log=log)
    dist.destroy_process_group()
    if rank == 0:
        _write(job, model, tokenizer, training, len(pairs))


def _write(
    job: Job,
    model: T5ForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    training: Training,
    num_instances: int,
) -> None:
    target = job.target
    target.mkdir(parents=True, exist_ok=True)
    model.to(torch.float16).save_pretrained(target)
    (target / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(target)
    reloaded = T5ForConditionalGeneration.from_pretrained(target, dtype=torch.float32, trust_remote_code=False)
    quality = evaluate(reloaded, tokenizer, validation())
    for family, figures in quality.items():
        _log(f"{family:24} greedy {figures.greedy:.3f} sample {figures.sample:.3f} oracle {figures.oracle:.3f}")
    record = {
        "command": f"python -m cappy.builtin llm --target FOLDER --steps {job.steps} --processes {job.processes} "
        f"--seed {job.seed} --num-per-family {job.num_per_family}",
        "seed": job.seed,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{os.cpu_count()}-core CPU",
        "torch": torch.__version__,
        "recipe": asdict(job.recipe),
        "num_instances": num_instances,
        "num_parameters": model.num_parameters(),
        "steps": training.steps,
        "seconds": training.seconds,
        "losses": training.losses,
        "rouge_l": {family: asdict(figures) for family, figures in quality.items()},
        "sha256": file_hashes(target),
    }
    (target / SEAL).write_text(json.dumps(record, indent=1) + "\n")
    verify(target)


def encode(rows: list[Instance], tokenizer: PreTrainedTokenizerFast) -> list[Pair]:
    """Token ids of instruction and answer; of several references each instance learns one, taken in turn."""
    sources = tokenizer([row.instruction for row in rows])["input_ids"]
    answers = [row.references[index % len(row.references)] for index, row in enumerate(rows)]
    return list(zip(sources, tokenizer(answers)["input_ids"], strict=True))


def validation() -> list[Instance]:
    """The same instances of the validation split for every LLM, an equal number of each family."""
    rows: dict[str, list[Instance]] = {}
    for row in instances("llm", num_per_family=NUM_EVALUATION * 40, seed=1):
        taken = rows.setdefault(row.task, [])
        if row.split == "validation" and len(taken) < NUM_EVALUATION:
            taken.append(row)
    return [row for taken in rows.values() for row in taken]


def _log(line: str) -> None:
    sys.stderr.write(f"{line}\n")


def _silent(line: str) -> None:
    """Only one process talks."""
