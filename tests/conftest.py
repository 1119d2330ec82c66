"""Very small random models of real architectures, shared by all tests, so that no weights are downloaded.

Also a real OpenAI-compatible server that is not part of this project: `transformers serve` on one of the models.
"""

import functools
import inspect
import logging
import os
import resource
import shutil
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pytest
from waiting import wait_until

# Very small models gain nothing from threads, and on a busy machine two threads that wait for each other starve.
os.environ.setdefault("OMP_NUM_THREADS", "1")


_stack_with_source = inspect.stack


def _stack(context: int = 0) -> list[inspect.FrameInfo]:
    """The callers, without source lines unless a number of them is given."""
    if context:
        return _stack_with_source(context)[1:]
    frame: FrameType | None = sys._getframe(1)
    frames = []
    while frame is not None:
        code = frame.f_code
        frames.append(inspect.FrameInfo(frame, code.co_filename, frame.f_lineno, code.co_name, None, None))
        frame = frame.f_back
    return frames


# Two calls that libraries make often cost much in a worker that has loaded thousands of modules. kfp's setters ask for
# the whole call stack, and `inspect` looks each frame up in all modules: a pipeline took seven seconds to compile. And
# every HTTP client reads all certificates again, even if it only talks to this machine; no client changes its context,
# so equal ones are shared.
inspect.stack = _stack
ssl.create_default_context = functools.cache(ssl.create_default_context)  # type: ignore[assignment]

CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
WORDS = "the a cat dog bird sat ran flew on in mat tree blue red one two three is are not yes no where who".split()


SLOWEST_FIRST = (
    "training/test_ranks.py",
    "training/remote/test_local_trainjobs.py",
    "training/test_tpu.py",
    "pipelines/test_local.py",
    "test_pulse.py",
    "test_readme.py",
    "test_model_folder.py",
    "serving/test_connections.py",
    "training/test_robustness.py",
    "pages/test_policy.py",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Starts the slow files first where workers share the tests by file, so that none runs alone at the end."""
    if hasattr(config, "workerinput"):
        ranks = {Path(__file__).parent / name: rank for rank, name in enumerate(SLOWEST_FIRST)}
        items.sort(key=lambda item: ranks.get(item.path, len(ranks)))


@pytest.fixture(autouse=True)
def root_log_filters() -> Iterator[None]:
    """Removes the filters of a service that ran in this process: they would count the lines of later tests."""
    before = [(handler, list(handler.filters)) for handler in logging.getLogger().handlers]
    yield
    for handler, filters in before:
        handler.filters[:] = filters


def _tokenizer(folder: Path, pair: bool) -> object:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    specials = ["<pad>", "</s>", "<unk>", "<s>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([" ".join(WORDS)], trainer)
    template = (
        TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 3), ("</s>", 1)]
        )
        if pair
        else TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    )
    tokenizer.post_processor = template
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        cls_token="<s>",
        sep_token="</s>",
    )
    fast.save_pretrained(folder)
    return fast


@pytest.fixture(scope="session")
def make_scorer(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """make_scorer(head="bce", max_length=48, seed=0) -> a finished scorer folder: a random RoBERTa of 2 layers."""

    def make(head: str = "bce", max_length: int = 48, seed: int = 0) -> Path:
        import torch
        from transformers import RobertaConfig, RobertaForSequenceClassification

        from cappy.scoring import Scorer
        from cappy.scoring.config import ScorerConfig

        folder = tmp_path_factory.mktemp("scorer")
        tokenizer = _tokenizer(tmp_path_factory.mktemp("tokenizer"), pair=True)
        torch.manual_seed(seed)
        config = RobertaConfig(
            vocab_size=len(tokenizer),  # type: ignore[arg-type]
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=max_length + 2,
            type_vocab_size=1,
            pad_token_id=0,
            bos_token_id=3,
            eos_token_id=1,
            num_labels=1,
            initializer_range=0.5,
        )
        model = RobertaForSequenceClassification(config).eval()
        Scorer(model, tokenizer, ScorerConfig(head=head, max_length=max_length)).save(folder)  # type: ignore[arg-type]
        return folder

    return make


@pytest.fixture(scope="session")
def scorer_folder(make_scorer: Callable[..., Path]) -> Path:
    """One scorer folder for tests that only read it."""
    return make_scorer()


@pytest.fixture
def foreign(make_scorer: Callable[..., Path], tmp_path: Path) -> Path:
    """A scorer's folder without a manifest, as another tool would write it; the test may change it."""
    folder = tmp_path / "foreign"
    shutil.copytree(make_scorer(seed=5), folder)
    (folder / "manifest.json").unlink()
    return folder


@pytest.fixture
def within() -> Iterator[None]:
    """The test ends in time, and this process's peak of memory grows by less than 100 MB."""
    start, before = time.monotonic(), _peak_bytes()
    yield
    assert time.monotonic() - start < 300  # seconds of CPU time are fewer: other processes run beside
    assert _peak_bytes() - before < 100 * 2**20


def _peak_bytes() -> int:
    """The most memory that this process ever had."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.fixture(scope="session")
def llm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random T5 of one layer whose generation config asks for top-k 50, as careless checkpoints do."""
    import torch
    from transformers import GenerationConfig, T5Config, T5ForConditionalGeneration
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    folder = tmp_path_factory.mktemp("llm")
    tokenizer = _tokenizer(folder, pair=False)
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(tokenizer),  # type: ignore[arg-type]
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_layers=1,
        num_heads=2,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    model = T5ForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        do_sample=True, top_k=50, temperature=0.1, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0
    )
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def causal_folder(tmp_path_factory: pytest.TempPathFactory, llm_folder: Path) -> Path:
    """A random Llama of one layer with the tokenizer of the tests' T5 and a chat template."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("causal")
    tokenizer = AutoTokenizer.from_pretrained(llm_folder)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def transformers_server(causal_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of `transformers serve`, offline; its model is the folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = Path(__file__).parent / "fakes/serve_transformers.py"
    log = tmp_path_factory.mktemp("serve") / "log"
    served = ("serve", str(causal_folder), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu")
    command = [sys.executable, str(program), *served]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with log.open("wb") as output:
        server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    try:
        url = f"http://127.0.0.1:{port}/v1/models"
        wait_until(
            lambda: _answers(url), f"an answer of {url}", seconds=120, pause=0.3, process=server, details=log.read_text
        )
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(30)


def _answers(url: str) -> bool:
    """Whether a server answers at all, be it with an error."""
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
