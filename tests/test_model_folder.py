"""What may be loaded from a model's folder: no code, no file that nobody listed, no size beyond the weights."""

import ast
import json
import logging
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from forked_commands import run_cappy
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, Gemma3TextConfig, M2M100Config
from wording import raises_naming

import cappy
from cappy.errors import CappyError, ConfigError, FolderError
from cappy.hub_client import hub_folder
from cappy.model_folder import check_size, open_model_folder
from cappy.records import Instance, write
from cappy.records.folder import Manifest, describe_files, write_manifest
from cappy.sampling import load_generator
from cappy.scoring import Scorer
from cappy.specs import parse_spec

ROOT = Path(cappy.__file__).parents[1]
COMMAND = (sys.executable, "-c", "from cappy.cli import main; main()")
LOADERS = ("from_pretrained", "from_config")
EVIL = """
import pathlib
pathlib.Path({mark!r}).write_text("ran")
from transformers import RobertaConfig as Config
"""


def edit(path: Path, **values: Any) -> None:
    """Sets values of a JSON file, which is made where it is missing."""
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**known, **values}))


@pytest.fixture
def evil(foreign: Path, tmp_path: Path) -> Path:
    """A folder whose Python leaves a mark when it runs."""
    code = {"AutoConfig": "evil.Config", "AutoModelForSequenceClassification": "evil.Model"}
    edit(foreign / "config.json", model_type="evil", auto_map=code)
    (foreign / "evil.py").write_text(EVIL.format(mark=str(tmp_path / "mark")))
    return foreign


@pytest.mark.parametrize(
    "words",
    [
        ("score", "--scorer", "{}"),
        ("select", "--scorer", "{}"),
        ("pretraining", "--encoder", "{}", "--source", "builtin", "--target", "out"),
        ("finetuning", "--scorer", "{}", "--source", "builtin", "--target", "out"),
        ("sampling", "--generator", "{}", "--source", "instances", "--target", "out"),
        ("serve", "--scorer", "{}", "--port", "0"),
    ],
    ids=lambda words: words[0],
)
def test_no_verb_runs_a_folders_python_whatever_stands_on_its_input(
    words: tuple[str, ...], evil: Path, tmp_path: Path
) -> None:
    write(tmp_path / "instances", [Instance(instance_id="1", instruction="Say a word.", references=("a",))])
    answer = b'y\n{"instruction": "a", "response": "b", "responses": ["b"]}\n'
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = run_cappy([word.format(evil) for word in words], tmp_path, environment, answer, seconds=120)
    assert done.returncode == 1
    assert b"evil" in done.stderr
    assert not (tmp_path / "mark").exists()
    assert b"Traceback" not in done.stderr
    assert done.stdout == b""


def test_data_on_standard_input_is_no_answer_to_a_librarys_question(tmp_path: Path) -> None:
    """Every line reaches the verb, and `input()` inside it finds the end of a file."""
    program = """
import sys
from cappy.cli import main, scoring
def ask(spec, precision, selector):
    try:
        print("asked and got", input(), file=sys.stderr)
    except EOFError:
        print("nobody there", file=sys.stderr)
    class Echo:
        def score(self, pairs):
            return [float(len(response)) for _, response in pairs]
    return Echo()
scoring._load = ask
main(["score"])
"""
    lines = "".join(json.dumps({"instruction": "y", "response": "a" * length}) + "\n" for length in (1, 2, 3))
    done = subprocess.run([sys.executable, "-c", program], input=lines, capture_output=True, text=True, timeout=60)
    assert "nobody there" in done.stderr
    assert [json.loads(line)["score"] for line in done.stdout.splitlines()] == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("config.json", {"auto_map": {"AutoModel": "evil.Model"}}),
        ("config.json", {"text_config": {"inner": [{"auto_map": {"AutoConfig": "org/repo--evil.Config"}}]}}),
        ("config.json", {"architectures": ["EvilForSequenceClassification"]}),
        ("config.json", {"attn_implementation": "org/kernel"}),
        ("config.json", {"_attn_implementation": {"": "kernels-community/flash-attn2:module"}}),
        ("config.json", {"experts_implementation": "org/kernel@main"}),
        ("config.json", {"configuration_files": ["../config.4.0.0.json"]}),
        ("config.json", {"transformers_weights": "other.safetensors"}),
        ("config.json", {"custom_pipelines": {"text": {"impl": "evil.Pipeline"}}}),
        ("tokenizer_config.json", {"auto_map": ["evil.Slow", "evil.Fast"]}),
        ("tokenizer_config.json", {"tokenizer_class": "EvilTokenizer"}),
        ("tokenizer_config.json", {"fast_tokenizer_files": ["tokenizer.4.0.0.json"]}),
        ("tokenizer_config.json", {"vocab": "../other/vocab.json"}),
        ("tokenizer_config.json", {"merges": "../other/merges.txt"}),
        ("generation_config.json", {"custom_generate": "evil"}),
        ("processor_config.json", {"auto_map": {"AutoProcessor": "evil.Processor"}}),
        ("preprocessor_config.json", {"auto_map": {"AutoImageProcessor": "evil.Processor"}}),
        ("sentence_bert_config.json", {"model_args": {"trust_remote_code": True}}),
        ("modules.json", {"modules": [{"type": "evil.Module"}]}),
        ("adapter_config.json", {"base_model_name_or_path": "org/other"}),
    ],
)
def test_a_json_file_that_names_code_is_refused_by_name(name: str, values: dict[str, Any], foreign: Path) -> None:
    edit(foreign / name, **values)
    for load in (Scorer.load, load_generator):
        with pytest.raises(FolderError, match=name) as error:
            load(str(foreign))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["BloomTokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend"])
def test_tokenizer_classes_of_transformers_own_past_are_no_code(name: str, foreign: Path) -> None:
    edit(foreign / "tokenizer_config.json", tokenizer_class=name)
    assert len(Scorer.load(str(foreign)).version) == 12


def test_what_is_no_file_of_a_folder_is_refused_by_name(foreign: Path) -> None:
    os.mkfifo(foreign / "pipe.json")
    with raises_naming(FolderError, "pipe.json: ", "not a file"):
        Scorer.load(str(foreign))
    (foreign / "pipe.json").unlink()
    (foreign / "gone.json").symlink_to(foreign / "nowhere")
    with raises_naming(FolderError, "gone.json: ", "not a file"):
        Scorer.load(str(foreign))


@pytest.mark.parametrize("name", ["modeling.py", "custom_generate/generate.py", "KERNEL.SO", "deep/a.pyc", "x.PKL"])
def test_a_file_of_code_is_refused_by_name(name: str, foreign: Path) -> None:
    (foreign / name).parent.mkdir(exist_ok=True)
    (foreign / name).write_bytes(b"")
    with pytest.raises(FolderError, match=Path(name).name):
        Scorer.load(str(foreign))


def test_every_call_that_loads_a_model_forbids_remote_code() -> None:
    folders = ("cappy", "components", "pipelines", "serving", "docker", "benchmarks")
    calls = [
        (f"{path.relative_to(ROOT)}:{call.lineno}", call)
        for folder in folders
        for path in sorted((ROOT / folder).rglob("*.py"))
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr in (*LOADERS, "LLM")
    ]
    assert len(calls) > 6, "the walk finds the calls"
    for where, call in calls:
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        value = given.get("trust_remote_code")
        assert isinstance(value, ast.Constant) and value.value is False, where  # noqa: PT018


@pytest.mark.parametrize("name", ["special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "a/b.txt"])
def test_a_file_that_the_manifest_does_not_list_is_refused(
    name: str, make_scorer: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / "scorer"
    shutil.copytree(make_scorer(seed=6), folder)
    Scorer.load(str(folder))
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text('{"sep_token": "<unk>"}')
    for load in (Scorer.load, load_generator):
        with pytest.raises(FolderError, match=rf"{Path(name).name}: .* manifest.json; delete"):
            load(str(folder))


def test_what_an_evaluation_leaves_and_hidden_files_may_lie_beside(
    make_scorer: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / "scorer"
    shutil.copytree(make_scorer(seed=6), folder)
    for name in ("probe.json", "calibration.json", ".gitignore", ".cache/a"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    assert open_model_folder(folder).has_manifest


def test_a_folder_without_a_manifest_is_named_by_what_lies_in_it(
    foreign: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        first = Scorer.load(str(foreign)).version
        assert Scorer.load(str(foreign)).version == first
    (line,) = [record.getMessage() for record in caplog.records if "no manifest" in record.getMessage()]
    assert first in line, "logged once, however often it is loaded"
    edit(foreign / "special_tokens_map.json", unk_token="<unk>")
    assert Scorer.load(str(foreign)).version not in ("", first)


def test_a_local_generators_revision_changes_with_every_file(causal_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "llm"
    shutil.copytree(causal_folder, folder)
    before = load_generator(str(folder)).revision
    edit(folder / "tokenizer_config.json", padding_side="left")
    assert load_generator(str(folder)).revision != before


SIZES: list[dict[str, Any]] = [
    {"num_hidden_layers": 10**9},
    {"num_hidden_layers": 90_000},
    {"hidden_size": 2**20, "num_attention_heads": 1},
    {"vocab_size": 10**9},
    {"max_position_embeddings": 10**10},
    {"intermediate_size": 2**34},
    {"type_vocab_size": 10**12},
    {"num_labels": 10**9},
    {"hidden_size": "wide"},
    {"hidden_size": -32},
    {"vocab_size": 10**400},
    {"hidden_act": "no such"},
]


def test_sizes_that_the_weights_do_not_have_end_in_one_line_without_the_memory(foreign: Path, tmp_path: Path) -> None:
    folders = []
    for number, values in enumerate(SIZES):
        folders.append(tmp_path / f"sizes-{number}")
        shutil.copytree(foreign, folders[-1])
        edit(folders[-1] / "config.json", **values)
    refused_within(*folders, megabytes=1500)


@pytest.mark.parametrize(
    ("config", "others"),
    [
        (M2M100Config(vocab_size=256_206, encoder_layers=1, decoder_layers=1), 40_000_000),
        (Gemma3TextConfig(vocab_size=262_144, hidden_size=640, num_hidden_layers=1), 20_000_000),
    ],
    ids=["NLLB", "Gemma"],
)
def test_shared_embeddings_count_once(config: Any, others: int) -> None:
    """They are made for encoder, decoder and head, and tied after that; the weights hold them once."""
    table = config.vocab_size * config.hidden_size
    loader = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    check_size(Path("folder"), loader, config, [table, others])
    with raises_naming(FolderError, "folder: ", "parameters", "weights"):
        check_size(Path("folder"), loader, config, [table // 8, others])


@pytest.mark.parametrize(("layers", "problem"), [(100_001, "above 100,000"), (90_000, "more layers")])
def test_layers_are_counted_in_the_file_and_while_the_model_is_built(layers: int, problem: str, foreign: Path) -> None:
    edit(foreign / "config.json", num_hidden_layers=layers)
    with pytest.raises(FolderError, match=problem):
        Scorer.load(str(foreign))


def refused_within(*folders: Path, megabytes: int) -> list[str]:
    """The line that loading each folder ends with, in a process whose memory may grow by so much."""
    program = f"""
import resource, sys
import torch
from transformers import AutoModelForSequenceClassification
from cappy.errors import CappyError
from cappy.scoring import Scorer
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + {megabytes} * 2**20,) * 2)
for folder in sys.argv[1:]:
    try:
        Scorer.load(folder)
    except CappyError as error:
        print(error)
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program, *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert [str(folder) in line for folder, line in zip(folders, lines, strict=True)] == [True] * len(folders)
    return lines


def header(length: int, text: bytes) -> bytes:
    return struct.pack("<Q", length) + text


def tensors(**shapes: object) -> bytes:
    """A safetensors file whose header describes tensors of these shapes, and which holds nothing."""
    entries = {name: {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]} for name, shape in shapes.items()}
    text = json.dumps(entries).encode()
    return header(len(text), text)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x01",
        header(2**63, b"{}"),
        header(99 * 2**20, b"{" + b" " * 1000),
        header(2, b"[]"),
        header(1000, b"{" * 1000),
        tensors(a=[2**40, 2**40]),
        tensors(a=[-1]),
        tensors(a=[2**47]),
        tensors(a="wide"),
        tensors(a=[10**400]),
    ],
)
def test_a_safetensors_header_that_is_none_ends_in_one_line(data: bytes, foreign: Path) -> None:
    (foreign / "model.safetensors").write_bytes(data)
    with raises_naming(FolderError, "model.safetensors: ", "download it again"):
        Scorer.load(str(foreign))


def test_a_safetensors_header_of_a_gigabyte_is_not_read(foreign: Path) -> None:
    with (foreign / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", 2**30))
        file.truncate(2**31)
    (line,) = refused_within(foreign, megabytes=1000)
    assert "model.safetensors" in line


def test_a_file_larger_than_its_kind_needs_is_not_read(foreign: Path, tmp_path: Path) -> None:
    names = ("config.json", "tokenizer_config.json", "tokenizer.json", "chat_template.jinja")
    folders = [tmp_path / name / "scorer" for name in names]
    for name, folder in zip(names, folders, strict=True):
        shutil.copytree(foreign, folder)
        with (folder / name).open("ab") as file:
            file.truncate(2**31)
    lines = refused_within(*folders, megabytes=1000)
    for name, line in zip(names, lines, strict=True):
        assert re.search(rf"scorer/{re.escape(name)}: .*\d,\d\d\d bytes", line), line


def test_deeply_nested_json_ends_in_one_line(foreign: Path) -> None:
    (foreign / "generation_config.json").write_text("[" * 100_000)
    with raises_naming(FolderError, "generation_config.json: ", "JSON"):
        Scorer.load(str(foreign))


def test_an_index_that_names_weights_elsewhere_is_refused(foreign: Path) -> None:
    edit(foreign / "model.safetensors.index.json", weight_map={"a": "../other/model.safetensors"})
    with raises_naming(FolderError, "model.safetensors.index.json: ", "'../other/model.safetensors'"):
        Scorer.load(str(foreign))


def test_a_generator_whose_weights_lack_a_parameter_is_refused(causal_folder: Path, tmp_path: Path) -> None:
    """transformers would draw the missing ones at random, and every sample would be noise."""
    folder = tmp_path / "llm"
    shutil.copytree(causal_folder, folder)
    edit(folder / "config.json", num_hidden_layers=2)
    with pytest.raises(FolderError, match=r"lack model\.layers\.1\."):
        load_generator(str(folder))


def test_a_manifest_from_elsewhere_may_state_sizes_no_more_than_others(foreign: Path) -> None:
    edit(foreign / "config.json", vocab_size=10**9)
    write_manifest(foreign, Manifest(step="save", files=describe_files(foreign)))
    with pytest.raises(CappyError, match="parameters"):
        Scorer.load(str(foreign))


@pytest.mark.parametrize("text", ["hub:../../etc@0123456", "hub:a/..@0123456", "hub:/a/b@0123456", "hub:a/b/c@0123456"])
def test_a_hub_spec_is_no_path(text: str) -> None:
    with pytest.raises(ConfigError, match="hub:org/name@revision"):
        parse_spec(text)


def test_a_branch_that_looks_like_a_commit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0123456789" * 4
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path / "snapshots" / commit))
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: SimpleNamespace(sha=commit))
    assert hub_folder(parse_spec(f"hub:org/name@{commit[:7]}")).name == commit
    with pytest.raises(ConfigError, match="deadbeef.*whole commit"):
        hub_folder(parse_spec("hub:org/name@deadbeef"))


def test_links_to_other_folders_are_refused(foreign: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (foreign / "additional_chat_templates").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FolderError, match="additional_chat_templates: .*link"):
        Scorer.load(str(foreign))


def test_a_tokenizer_with_tokens_that_the_model_has_not_is_refused(foreign: Path) -> None:
    tokenizer = json.loads((foreign / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["cat"] = 10**6
    (foreign / "tokenizer.json").write_text(json.dumps(tokenizer))
    with raises_naming(FolderError, "tokenizer", "token 1000000"):
        Scorer.load(str(foreign))


def test_a_pattern_that_gives_up_on_a_text_is_one_line_and_the_scorer_goes_on(foreign: Path) -> None:
    tokenizer = json.loads((foreign / "tokenizer.json").read_text())
    pattern = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [pattern, tokenizer["pre_tokenizer"]]}
    (foreign / "tokenizer.json").write_text(json.dumps(tokenizer))
    scorer = Scorer.load(str(foreign), precision="fp32")
    with raises_naming(FolderError, "tokenizer failed"):
        scorer.score([("a" * 5000 + "b", "a")])
    assert len(scorer.score([("where is the cat", "mat")])) == 1


def test_a_folder_that_tensorflow_or_flax_wrote_may_name_their_classes(foreign: Path) -> None:
    for name in ("TFRobertaForSequenceClassification", "FlaxRobertaForSequenceClassification"):
        edit(foreign / "config.json", architectures=[name])
        Scorer.load(str(foreign))
