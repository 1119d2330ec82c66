"""The speed of generators in sampling, and of scorers in training and scoring, for `throughput.py`."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import torch
from builtin_steps import LENGTH, POOL, size_of
from scoring_data import scorer_folder
from throughput_bench import Bench
from throughput_texts import builtin_instances
from transformers import AutoTokenizer, BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

from cappy.annotation.step import AnnotationConfig
from cappy.annotation.step import run as annotation
from cappy.builtin import LLM_FOLDER
from cappy.builtin.tasks import instances as builtin_tasks
from cappy.costing.costs import GENERATORS, SCORERS, GeneratorShape
from cappy.model_folder import open_model_folder
from cappy.records import Instance, write
from cappy.sampling.architectures import Seq2Seq
from cappy.sampling.strategies import Decoding, parse_strategy
from cappy.scoring import Scorer
from cappy.scoring.config import ScorerConfig
from cappy.training import checkpoint
from cappy.training.corpus import open_corpora
from cappy.training.distributed import SINGLE_RANK
from cappy.training.feed import draw_batch
from cappy.training.loop import TrainingRun
from cappy.training.pretraining import PretrainingConfig, new_encoder

RESPONSE_TOKENS = 24
UPDATES = {"mini": 20, "builtin": 20, "roberta-base": 4}
"""Timed updates by scorer; 2 for others."""
MAX_WHOLE_WEIGHTS = 1_000_000_000
"""Encoders with more weights are measured with `MEASURED_LAYERS` layers on a CPU, for lack of memory."""
MEASURED_LAYERS = 4


def measure_sampling(bench: Bench, names: Sequence[str], sample: Sequence[Instance]) -> None:
    """Each generator on T0's open-ended prompts, the built-in one on built-in tasks; fewer prompts for larger ones."""
    open_ended = [instance.instruction for instance in sample if not instance.choices]
    for name in names:
        shape = GENERATORS[name]
        if shape.encoder_weights > MAX_WHOLE_WEIGHTS and bench.hardware == "cpu":
            shape = replace(shape, layers=MEASURED_LAYERS)
        with TemporaryDirectory(dir=bench.work) as folder:
            if name == "builtin":
                texts = [
                    instance.instruction
                    for instance in builtin_tasks(POOL, num_per_family=20, seed=2)
                    if not instance.choices
                ]
                generator, decodings = (
                    Seq2Seq(name, open_model_folder(LLM_FOLDER)),
                    parse_strategy("topk40x5+topp0.95x5"),
                )
            else:
                random_weights(shape, Path(folder))
                count = max(4, min(64, round(4e9 / (shape.encoder_weights + shape.decoder_weights))))
                count = 512 if bench.hardware != "cpu" else count
                texts, generator = open_ended[:count], Seq2Seq(name, open_model_folder(Path(folder)))
                decodings = (replace(parse_strategy("topk40x5")[0], max_new_tokens=RESPONSE_TOKENS),)
            record_sampling(bench, name, shape, generator, texts, decodings)


def record_sampling(
    bench: Bench,
    name: str,
    shape: GeneratorShape,
    generator: Seq2Seq,
    texts: Sequence[str],
    decodings: Sequence[Decoding],
) -> None:
    """Samples once, after a warm-up with two prompts, and records FLOP/s and tokens per second."""
    generator.sample(texts[:2], decodings, seed=1)
    seconds, candidates = bench.time_call(lambda: generator.sample(texts, decodings, seed=0))
    prompts = [len(ids) for ids in generator.tokenizer(list(texts), max_length=512, truncation=True).input_ids]
    token_counts = [[candidate.num_tokens or 0 for candidate in group] for group in candidates]
    flops = sum(shape.prompt_flops(prompt, prompt**2) for prompt in prompts)
    flops += sum(
        shape.response_flops(tokens, prompt)
        for prompt, counts in zip(prompts, token_counts, strict=True)
        for tokens in counts
    )
    responses = sum(map(sum, token_counts))
    details: dict[str, Any] = {
        "prompts": len(texts),
        "prompt_tokens": fmean(prompts),
        "candidates": sum(map(len, token_counts)),
    }
    details["layers"] = shape.layers
    bench.record(
        "sampling", name, "FLOP/s", flops / seconds, response_tokens_per_second=responses / seconds,
        response_tokens=responses / details["candidates"], seconds=seconds, **details, **bench.share(flops / seconds),
    )  # fmt: skip


def random_weights(shape: GeneratorShape, folder: Path) -> None:
    """Saves a model of the shape with random weights and the built-in tokenizer."""
    torch.manual_seed(0)
    special_tokens = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    if shape.gated:
        config: Any = T5Config(
            vocab_size=shape.vocabulary, d_model=shape.hidden, d_kv=64, num_heads=shape.attention // 64,
            d_ff=shape.inner, num_layers=shape.layers, num_decoder_layers=shape.layers,
            feed_forward_proj="gated-gelu", tie_word_embeddings=False, **special_tokens,
        )  # fmt: skip
        model: Any = T5ForConditionalGeneration(config)
    else:
        config = BartConfig(
            vocab_size=shape.vocabulary, d_model=shape.hidden, encoder_layers=shape.layers,
            decoder_layers=shape.layers, encoder_attention_heads=16, decoder_attention_heads=16,
            encoder_ffn_dim=shape.inner, decoder_ffn_dim=shape.inner, bos_token_id=0, forced_eos_token_id=None,
            **special_tokens,
        )  # fmt: skip
        model = BartForConditionalGeneration(config)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(LLM_FOLDER, trust_remote_code=False).save_pretrained(folder)


def run_updates(run: TrainingRun, times: int) -> None:
    for _ in range(times):
        run.run_update()


def measure_training(bench: Bench, names: Sequence[str], sample: Sequence[Instance]) -> None:
    """Updates of each scorer, without the first one; `mini` and `builtin` on the built-in tasks."""
    for name in names:
        scorer, instances = scorer_and_texts(bench, name, sample, precision="fp32")
        source = bench.work / f"training-{name}"
        labelled = (replace(instance, split="train") for instance in instances)
        write(source / "instances", labelled)
        annotation(AnnotationConfig(source=source / "instances", target=source / "labels", work=source / "work"))
        on_gpu = bench.hardware != "cpu"
        is_small = name in ("mini", "builtin")
        config = PretrainingConfig(
            source=source / "labels", target=source / "none", epochs=4.0,
            max_candidates=16 if on_gpu or is_small else 8, batch_instances=8 if on_gpu or is_small else 2,
            batch_tokens=32_768 if on_gpu else 2_048, learning_rate=1e-5,
        )  # fmt: skip
        corpora = open_corpora(
            config.source, source / "tokens", scorer.tokenizer, scorer.encoder, metric="rougeL", sources=()
        )
        run = TrainingRun(scorer, corpora, config, source / "checkpoints", SINGLE_RANK)
        run.run_update()
        updates = UPDATES.get(name, 2) * (1 + 3 * on_gpu)
        pools = [
            pool
            for number in range(1, updates + 1)
            for pool in draw_batch(
                corpora.train, number, config.batch_instances, config.max_candidates, seed=config.seed
            )
        ]
        lengths = [length for pool in pools for length in corpora.train.token_counts(pool.index, pool.responses)]
        seconds, _ = bench.time_call(partial(run_updates, run, updates))
        flops = sum(SCORERS[name].training_flops(length, length**2) for length in lengths) / seconds
        bench.record(
            "pretraining", name, "FLOP/s", flops, pairs_per_second=len(lengths) / seconds, pairs=len(lengths),
            tokens_per_second=sum(lengths) / seconds, pair_tokens=fmean(lengths), **bench.share(flops),
        )  # fmt: skip
        if name == "mini":
            weights = run.strategy.weights()
            state = checkpoint.Checkpoint(
                state=run.state, weights=weights, moments=run.strategy.moments(), best=weights
            )
            checkpoint.save(source / "saved", state)
            bench.record(
                "pretraining", "builtin", "bytes/weight", size_of(source / "saved") / SCORERS[name].weights,
                hardware="cpu", weights=SCORERS[name].weights,
            )  # fmt: skip


def measure_scoring(bench: Bench, names: Sequence[str], sample: Sequence[Instance]) -> None:
    """Pairs scored by `Scorer.score` with its default settings."""
    for name in names:
        scorer, instances = scorer_and_texts(bench, name, sample, precision="auto")
        count = {"mini": 1_000, "builtin": 2_000, "roberta-base": 200}.get(name, 80)
        count = 4_096 if bench.hardware != "cpu" else count
        texts = (
            (instance.instruction, candidate.response) for instance in instances for candidate in instance.candidates
        )
        pairs = list(dict.fromkeys(texts))[:count]  # Duplicates would be scored only once.
        scorer.score(pairs[:4])
        seconds, _ = bench.time_call(lambda: scorer.score(pairs))  # noqa: B023
        lengths = [len(encoded.ids) for encoded in scorer.encoder.encode(pairs)]
        shape = SCORERS[name]
        flops = sum(shape.scoring_flops(length, length**2) for length in lengths) / seconds
        bench.record(
            "evaluation", name, "FLOP/s", flops, pairs_per_second=len(pairs) / seconds, pairs=len(pairs),
            pair_tokens=fmean(lengths), **bench.share(flops),
        )  # fmt: skip


def scorer_and_texts(
    bench: Bench, name: str, sample: Sequence[Instance], *, precision: Any
) -> tuple[Scorer, Sequence[Instance]]:
    """A scorer of the shape with random weights, and the instances to measure it on."""
    if name.startswith("roberta-"):
        folder = scorer_folder(name.removeprefix("roberta-"), bench.work / "scorers")
        return Scorer.load(str(folder), precision=precision), sample
    shape = SCORERS[name]
    torch.manual_seed(0)
    model, tokenizer = new_encoder(shape.layers, shape.hidden, LENGTH)
    folder = bench.work / f"scorers/{name}"
    Scorer(model, tokenizer, ScorerConfig(head="bce", max_length=LENGTH)).save(folder)
    return Scorer.load(str(folder), precision=precision), builtin_instances(24)
