"""Speed of sampling the 17 candidates of the published scheme, compared with a naive implementation.

    python benchmarks/sampling.py [--instructions 32] [--threads 1]

An encoder-decoder of FLAN-T5-small's shape with random weights gets a seeded sample of instructions, in file order,
from the BIG-bench tasks under `shared/data/bigbench` (or `--bigbench FOLDER`). It almost never ends a response, so
every response has `--tokens` tokens. The built-in LLM gets the built-in tasks. The naive implementation calls
`generate` once per decoding, five times, on padded batches of 32 in file order, then runs a forward pass over every
candidate for its likelihoods, which ours includes (results are also given without that pass). Both use the same
instructions and decoding parameters in the same run, and greedy decoding must give the same tokens. Results are written
to `benchmarks/results/` as JSON with date and machine.
"""

import argparse
import gzip
import json
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
from machine import machine
from transformers import AutoTokenizer, GenerationConfig, T5Config, T5ForConditionalGeneration
from transformers.utils.logging import disable_progress_bar

from cappy.builtin import LLM_FOLDER
from cappy.builtin.tasks import instances
from cappy.model_folder import open_model_folder
from cappy.sampling.architectures import MAX_INSTRUCTION_TOKENS, Seq2Seq
from cappy.sampling.strategies import GREEDY, MAX_NEW_TOKENS, STRATEGIES, Decoding

ROOT = Path(__file__).resolve().parents[1]
BIGBENCH = ROOT.parent / "shared/data/bigbench"
BATCH = 32
FLAN_T5_SMALL = {
    "vocab_size": 32128, "d_model": 512, "d_kv": 64, "d_ff": 1024, "num_layers": 8, "num_decoder_layers": 8,
    "num_heads": 6, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "decoder_start_token_id": 0,
    "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
"""The shape of google/flan-t5-small, from its config.json."""
T = TypeVar("T")


def main() -> None:
    """Measures both models and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bigbench", type=Path, default=BIGBENCH, help="folder of JSON Lines files, gzipped")
    parser.add_argument(
        "--instructions", type=int, default=32, help="number of instructions for the random weights; 0: skip them"
    )
    parser.add_argument("--tokens", type=int, default=16, help="tokens of every response of the random weights")
    parser.add_argument("--per-family", type=int, default=4, help="instructions of each built-in family")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    load = os.getloadavg()[0]
    builtin_instructions = [
        instance.instruction for instance in instances("adaptation", num_per_family=arguments.per_family, seed=0)
    ]
    models = {"built-in LLM": compare(LLM_FOLDER, builtin_instructions, MAX_NEW_TOKENS)}
    print(models, flush=True)
    if arguments.instructions:
        with TemporaryDirectory() as folder:
            random_weights(Path(folder))
            bigbench = read_instructions(arguments.bigbench, arguments.instructions)
            models["shape of FLAN-T5-small, random weights"] = compare(Path(folder), bigbench, arguments.tokens)
    result = {
        "benchmark": "sampling",
        "date": date.today().isoformat(),
        "machine": machine(),
        "threads": arguments.threads,
        "load_before": load,
        "strategy": "paper17",
        "models": models,
    }
    target = ROOT / "benchmarks/results/sampling.json"
    target.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def compare(folder: Path, instructions: Sequence[str], tokens: int) -> dict[str, float]:
    """Seconds of both ways for the same instructions, warmed up by a few greedy responses."""
    generator = Seq2Seq("ours", open_model_folder(folder))
    decodings = [replace(decoding, max_new_tokens=tokens) for decoding in STRATEGIES["paper17"]]
    greedy_alone = replace(GREEDY, max_new_tokens=tokens)
    greedy, expected = [
        [response.tokens for ((response,),) in generator.respond(instructions[:8], [greedy_alone], seed=0)],
        [tuple(row) for row in generate(generator, instructions[:8], greedy_alone)],
    ]
    equal = sum(tokens == reference for tokens, reference in zip(greedy, expected, strict=True))
    ours, candidates = time_call(lambda: generator.sample(instructions, decodings, seed=0))
    generate_seconds, rows = time_call(lambda: sample_naively(generator, instructions, decodings))
    likelihood_seconds, _ = time_call(lambda: likelihoods(generator, instructions, rows))
    count = sum(map(len, candidates))
    assert count == sum(map(len, rows))
    lengths = [len(ids) for ids in generator.tokenizer(list(instructions), max_length=512, truncation=True).input_ids]
    return {
        "instructions": len(instructions),
        "instruction_tokens_mean": sum(lengths) / len(lengths),
        "instruction_tokens_longest": max(lengths),
        "candidates": count,
        "response_tokens_mean_ours": sum(candidate.num_tokens or 0 for group in candidates for candidate in group)
        / count,
        "response_tokens_mean_generate": sum(len(row) for group in rows for row in group) / count,
        "greedy_equal_of_8": equal,
        "ours_seconds": ours,
        "generate_seconds": generate_seconds,
        "generate_with_likelihoods_seconds": generate_seconds + likelihood_seconds,
        "times_generate": generate_seconds / ours,
        "times_generate_with_likelihoods": (generate_seconds + likelihood_seconds) / ours,
    }


@torch.inference_mode()
def sample_naively(
    generator: Seq2Seq, instructions: Sequence[str], decodings: Sequence[Decoding]
) -> list[list[list[int]]]:
    """Responses of each instruction by one call of `generate` per decoding and batch."""
    responses_by_instruction: list[list[list[int]]] = [[] for _ in instructions]
    torch.manual_seed(0)
    for decoding in decodings:
        rows = generate(generator, instructions, decoding)
        for index, row in enumerate(rows):
            responses_by_instruction[index // decoding.num_samples].append(row)
    return responses_by_instruction


@torch.inference_mode()
def generate(generator: Seq2Seq, instructions: Sequence[str], decoding: Decoding) -> list[list[int]]:
    """Token ids of one decoding, in padded batches in file order, up to each row's end token."""
    options: dict[str, Any] = {"temperature": decoding.temperature, "top_k": decoding.top_k, "top_p": decoding.top_p}
    config = GenerationConfig(
        do_sample=decoding.do_sample, num_beams=decoding.num_beams, num_return_sequences=decoding.num_samples,
        max_new_tokens=decoding.max_new_tokens, decoder_start_token_id=0, eos_token_id=1, pad_token_id=0,
        **(options if decoding.do_sample else {}),
    )  # fmt: skip
    rows: list[list[int]] = []
    for start in range(0, len(instructions), BATCH):
        inputs = tokenize(generator, instructions[start : start + BATCH])
        rows += generator.model.generate(**inputs, generation_config=config)[:, 1:].tolist()
    return [row[: row.index(1) + 1] if 1 in row else row for row in rows]


@torch.inference_mode()
def likelihoods(
    generator: Seq2Seq, instructions: Sequence[str], rows: Sequence[Sequence[Sequence[int]]]
) -> list[float]:
    """The log-probability sum of every candidate, by one padded forward pass per 8 instructions."""
    sums: list[float] = []
    for start in range(0, len(instructions), 8):
        responses = [torch.tensor(row) for group in rows[start : start + 8] for row in group]
        per_instruction = len(rows[start])
        inputs = tokenize(generator, instructions[start : start + 8])
        states = generator.model.get_encoder()(**inputs)
        states.last_hidden_state = states.last_hidden_state.repeat_interleave(per_instruction, 0)
        labels = torch.nn.utils.rnn.pad_sequence(responses, batch_first=True, padding_value=0)
        logits = generator.model(
            encoder_outputs=states, attention_mask=inputs["attention_mask"].repeat_interleave(per_instruction, 0),
            decoder_input_ids=torch.nn.functional.pad(labels, (1, -1)),
        ).logits  # fmt: skip
        logprobs = logits.gather(-1, labels[..., None]).squeeze(-1) - logits.logsumexp(-1)
        sums += (logprobs * (labels != 0)).sum(-1).tolist()
    return sums


def tokenize(generator: Seq2Seq, instructions: Sequence[str]) -> dict[str, torch.Tensor]:
    """Padded token ids and attention mask."""
    return dict(
        generator.tokenizer(
            list(instructions), padding=True, truncation=True, max_length=MAX_INSTRUCTION_TOKENS, return_tensors="pt"
        )
    )


def random_weights(folder: Path) -> None:
    """Saves a model of FLAN-T5-small's shape with the built-in tokenizer."""
    torch.manual_seed(0)
    T5ForConditionalGeneration(T5Config(**FLAN_T5_SMALL)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(LLM_FOLDER, trust_remote_code=False).save_pretrained(folder)


def read_instructions(folder: Path, count: int) -> list[str]:
    """A seeded sample of `count` instructions from all files, in file order."""
    texts = []
    for path in sorted(folder.glob("*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            texts += [json.loads(line)["instruction"] for line in file]
    chosen = sorted(random.Random(0).sample(range(len(texts)), min(count, len(texts))))
    return [texts[index] for index in chosen]


def time_call(function: Callable[[], T]) -> tuple[float, T]:
    """Seconds of a call, and its result."""
    started = time.perf_counter()
    value = function()
    return time.perf_counter() - started, value


if __name__ == "__main__":
    main()
