"""Training speed in rows per second, compared with padding every pair to 512 and with CrossEncoderTrainer.

    python benchmarks/training.py [--size base] [--per-set 16] [--rounds 2] [--device cpu]

All three train one epoch on the same rows with the same encoder (RoBERTa's shape and vocabulary, random weights), in
turn in every round; the best round counts. Rows are whole pools of every set of `shared/data/candidates`, so lengths
are real; labels are random, which does not affect speed. Our time includes reading the folder and tokenizing, as in a
first run; the others tokenize during training. `padded to 512` is the published way: batches in the order of the rows,
every pair padded to the model's length, transformers' own forward. CrossEncoderTrainer runs with its defaults: random
batches of 8, padded to the longest pair of each, mean squared error. Dropout is on in all three. On a GPU all three use
bf16.

Needs the packages that `make bench` installs. Results are written to `benchmarks/results/training-SIZE-DEVICE.json`
with date and machine.
"""

import argparse
import json
import random
import shutil
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from machine import machine
from scoring_data import LENGTH, POOL, SHAPES, candidate_files, read_pools, scorer_folder
from torch.nn.functional import mse_loss

from cappy.records import Candidate, Instance, write
from cappy.scoring import Scorer
from cappy.training.corpus import Corpora, open_corpora
from cappy.training.distributed import SINGLE_RANK
from cappy.training.finetuning import FinetuningConfig
from cappy.training.loop import TrainingRun
from cappy.training.meter import count_layer_weights, pair_flops, peak_flops

ROOT = Path(__file__).resolve().parents[1]
BATCH = 8
"""Batch size in pairs of the two others: CrossEncoderTrainer's default."""
RATE = 2e-5


def main() -> None:
    """Measures and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SHAPES, default="base")
    parser.add_argument(
        "--per-set", type=int, default=16, help="approximate number of rows from each set of candidates"
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--work", type=Path, default=Path(".cappy/benchmarks/training"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    start = scorer_folder(arguments.size, arguments.work)
    scorer = Scorer.load(str(start), precision="fp32")
    instances = real_instances(scorer, arguments.per_set)
    source = arguments.work / f"rows-{arguments.per_set}"
    shutil.rmtree(source, ignore_errors=True)
    write(source, instances)
    rows = [(i.instruction, c.response, c.labels["rougeL"]) for i in instances for c in i.candidates]
    lengths = [len(pair.ids) for pair in scorer.encoder.encode([row[:2] for row in rows])]
    device = arguments.device
    ways: dict[str, Callable[[], float]] = {
        "cappy": lambda: time_ours(start, source, arguments.work, device),
        "padded to 512": lambda: time_padded(start, rows, device),
        "CrossEncoderTrainer": lambda: time_cross_encoder(start, rows, arguments.work, device),
    }
    seconds = dict.fromkeys(ways, float("inf"))
    for _ in range(arguments.rounds):
        for name, way in ways.items():
            seconds[name] = min(seconds[name], way())
            print(f"{name}: {seconds[name]:.1f} s for {len(rows)} rows", flush=True)
    config, weights = scorer.model.config, count_layer_weights(scorer.model)
    flops = sum(pair_flops(config, weights, length) for length in lengths)
    peak = peak_flops(torch.device(device), 1, bf16=True)
    result = {
        "benchmark": "training",
        "date": date.today().isoformat(),
        "machine": machine(),
        "threads": arguments.threads,
        "command": f"python benchmarks/training.py --size {arguments.size} --per-set {arguments.per_set}"
        f" --rounds {arguments.rounds} --device {device} --threads {arguments.threads}",
        "rows": len(rows),
        "tokens": sum(lengths),
        "longest": max(lengths),
        "ways": {
            name: {
                "seconds": best,
                "rows_per_second": len(rows) / best,
                "tokens_per_second": sum(lengths) / best,
                "gflops": flops / best / 1e9,
                "mfu": flops / best / peak if peak else None,
                "cappy_is_times_as_fast": best / seconds["cappy"],
            }
            for name, best in seconds.items()
        },
    }
    target = ROOT / f"benchmarks/results/training-{arguments.size}-{device}.json"
    target.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["ways"], indent=1))


def real_instances(scorer: Scorer, per_set: int) -> list[Instance]:
    """Whole pools of every set, shuffled over the sets; no pair is longer than the model."""
    rng = random.Random(0)
    instances: list[Instance] = []
    for path in candidate_files():
        rows = 0
        for row_index, (instruction, responses) in enumerate(read_pools(path)):
            pool = responses[:POOL]
            longest = max(
                len(pair.ids) for pair in scorer.encoder.encode([(instruction, response) for response in pool])
            )
            if len(pool) < 2 or longest > LENGTH:
                continue
            candidates = tuple(Candidate(response=response, labels={"rougeL": rng.random()}) for response in pool)
            name = f"{path.name.split('.')[0]}-{row_index}"
            instances.append(
                Instance(instance_id=name, instruction=instruction, references=(pool[0],), candidates=candidates)
            )
            rows += len(pool)
            if rows >= per_set:
                break
    rng.shuffle(instances)
    return instances


def time_ours(start: Path, source: Path, work: Path, device: str) -> float:
    """Seconds of one epoch of our loop, with tokenization."""
    tokens = work / "tokens"
    shutil.rmtree(tokens, ignore_errors=True)
    scorer = Scorer.load(str(start), device=device, precision="fp32")
    budget = 2048 if device == "cpu" else 32768
    config = FinetuningConfig(
        source=source, target=work / "none", scorer=str(start), epochs=1.0, learning_rate=RATE, batch_tokens=budget
    )
    started = time.perf_counter()
    corpora: Corpora = open_corpora(source, tokens, scorer.tokenizer, scorer.encoder, metric="rougeL", sources=())
    run = TrainingRun(scorer, corpora, config, work / "no-checkpoints", SINGLE_RANK)
    while run.state.update < run.updates:
        run.run_update()
    _synchronize(device)
    return time.perf_counter() - started


def time_padded(start: Path, rows: Sequence[tuple[str, str, float]], device: str) -> float:
    """Seconds of one epoch of a plain loop that pads every pair to the model's length."""
    scorer = Scorer.load(str(start), device=device, precision="fp32")
    model, tokenizer = scorer.model.train(), scorer.tokenizer
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    started = time.perf_counter()
    for first in range(0, len(rows), BATCH):
        instructions, responses, labels = zip(*rows[first : first + BATCH], strict=True)
        inputs = tokenizer(
            list(instructions), list(responses), padding="max_length", max_length=LENGTH, return_tensors="pt"
        ).to(device)
        with torch.autocast(device, torch.bfloat16, enabled=device != "cpu"):
            scores = model(**inputs).logits.squeeze(-1).sigmoid()
        mse_loss(scores.float(), torch.tensor(labels, device=device)).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    _synchronize(device)
    return time.perf_counter() - started


def time_cross_encoder(start: Path, rows: Sequence[tuple[str, str, float]], work: Path, device: str) -> float:
    """Seconds of one epoch of CrossEncoderTrainer with its defaults, without logs and checkpoints."""
    from datasets import Dataset
    from sentence_transformers.cross_encoder import CrossEncoder, CrossEncoderTrainer, CrossEncoderTrainingArguments
    from sentence_transformers.cross_encoder.losses import MSELoss

    model = CrossEncoder(str(start), device=device)
    settings: dict[str, Any] = {"save_strategy": "no", "report_to": "none", "logging_strategy": "no"}
    arguments = CrossEncoderTrainingArguments(
        output_dir=str(work / "trainer"),
        num_train_epochs=1,
        per_device_train_batch_size=BATCH,
        learning_rate=RATE,
        use_cpu=device == "cpu",
        bf16=device != "cpu",
        disable_tqdm=True,
        **settings,
    )
    instructions, responses, labels = (list(column) for column in zip(*rows, strict=True))
    data = Dataset.from_dict({"instruction": instructions, "response": responses, "label": labels})
    trainer = CrossEncoderTrainer(model=model, args=arguments, train_dataset=data, loss=MSELoss(model))
    started = time.perf_counter()
    trainer.train()
    _synchronize(device)
    return time.perf_counter() - started


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
