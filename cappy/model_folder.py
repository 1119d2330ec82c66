"""Checks the folder of a model before anything in it is loaded, and loads it.

transformers can run Python code that a folder names, reads any tokenizer file beside the weights, and builds a model of
any size that config.json states. So every loader of the project opens the folder here first:

- a folder with a manifest must contain exactly the listed files, each with its sha256; a folder without one is hashed,
  and the hash is logged;
- neither a file nor a key of a JSON file may name code;
- JSON files, templates, tables and safetensors headers have size limits, and config.json must not describe a much
  larger model than the weights contain.
"""

import hashlib
import json
import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from cappy.errors import FolderError, quote
from cappy.records.folder import MANIFEST, Manifest, describe_files, verify
from cappy.untrusted import check_text_growth

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from cappy.untrusted import JSON

LOGGER = logging.getLogger(__name__)
_LOGGED: set[tuple[Path, str]] = set()
"""Folders and hashes that this process has logged."""

PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt", "*.npy", "*.joblib", "*.msgpack")
ADAPTER = "adapter_config.json"
CODE = ("*.py", "*.pyc", "*.pyd", "*.so", "*.dll", "*.dylib")
UNLISTED_FILES = frozenset({MANIFEST, "selector.json", "calibration.json", "probe.json", "out_of_fold.json"})
"""The manifest, and files that an evaluation adds later; a registered version has the sha256 of those in its tags."""

MAX_CONFIG_BYTES = 4 * 2**20
"""Size limit of templates and of JSON files other than vocabularies; the largest known have a few hundred kB."""
MAX_TABLE_BYTES = 128 * 2**20
"""Size limit of tokenizer.json, a vocabulary or merges; Gemma's has 33 MB."""
MAX_HEADER_BYTES = 16 * 2**20
"""Size limit of a safetensors header: about 150,000 tensors."""
MAX_COUNT = 100_000
"""Limit of layers, heads, experts and labels in config.json: transformers, on reading it, builds lists that long."""
SPARE_ELEMENTS = 2**26
"""A model may have up to twice the elements of its weights plus this number: room for a new head or position tables."""
SPARE_MODULES = 10_000

_TABLES = ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "added_tokens.json", "*.model", "*.tiktoken")
_INDEX = "*.safetensors.index.json"
_COUNT_KEYS = re.compile(r"^_?num_|(layers?|heads?|experts?|labels|blocks?|stages?|depths?)$")
_CODE_KEYS = frozenset({"auto_map", "custom_pipelines", "custom_generate"})
_FILE_KEYS = frozenset({"configuration_files", "fast_tokenizer_files", "transformers_weights"})
"""Keys that make transformers read files with unusual names."""
_TABLE_KEYS = frozenset({"vocab", "merges"})
"""Keys of tokenizer_config.json that contain tables; transformers reads a string there as a path."""
_KERNEL_KEYS = frozenset({"attn_implementation", "experts_implementation"})
_SENTENCE_TRANSFORMERS = "sentence_transformers."
_JSON_REMEDY = "delete it if it does not belong to the model, else download the folder again"
_REMOVED_TOKENIZERS = frozenset({"BloomTokenizer"})
"""Classes that transformers 5 removed but still loads as its generic tokenizer (`tokenizer_class_from_name`)."""


class Module(Protocol):
    """The part of a torch module that is used here."""

    def parameters(self) -> "Iterator[torch.nn.Parameter]": ...

    def buffers(self) -> "Iterator[torch.Tensor]": ...


Model_co = TypeVar("Model_co", bound=Module, covariant=True)


class AutoModel(Protocol[Model_co]):
    """The part of transformers' AutoModelFor... classes that is used here."""

    def from_config(self, config: "PreTrainedConfig", *, trust_remote_code: bool) -> Model_co:
        """A model with random weights."""

    def from_pretrained(self, folder: Path, **options: Any) -> tuple[Model_co, Mapping[str, Iterable[Any]]]:
        """The model of a folder, and its loading info: missing, unexpected and mismatched parameters."""


@dataclass(frozen=True, kw_only=True)
class ModelFolder:
    """A checked folder: `hash` is a sha256 over all files; `has_manifest` is whether a manifest lists them."""

    path: Path
    hash: str
    has_manifest: bool

    def config(self) -> "PreTrainedConfig":
        """The configuration as transformers reads it. Raises FolderError if it does not describe a model."""
        from transformers import AutoConfig

        if not (self.path / "config.json").is_file():
            raise FolderError(f"{self.path}: has no config.json; give a folder that transformers saved")
        remedy = "give a folder that transformers saved (config.json with its model_type)"
        with _folder_errors(f"{self.path}: config.json does not describe a model", remedy):
            return AutoConfig.from_pretrained(self.path, trust_remote_code=False, local_files_only=True)

    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer. Raises FolderError if transformers cannot read it."""
        from transformers import AutoTokenizer

        problem, remedy = f"{self.path}: its tokenizer cannot be read", "save the tokenizer again, next to the weights"
        if any(self.path.glob("*.model")) and not (self.path / "tokenizer.json").exists():
            remedy = "save it as tokenizer.json where sentencepiece is installed (AutoTokenizer, save_pretrained)"
        with _folder_errors(problem, remedy):
            tokenizer = AutoTokenizer.from_pretrained(self.path, trust_remote_code=False, local_files_only=True)
            check_text_growth(tokenizer)
            return tokenizer

    def model(self, auto_class: AutoModel[Model_co], config: "PreTrainedConfig") -> tuple[Model_co, list[str]]:
        """The model in fp32 on the CPU, and the names of parameters that are missing in the weights and thus random.

        Raises FolderError if config.json describes a larger model or other shapes, or if it cannot be loaded.
        """
        import torch

        check_size(self.path, auto_class, config, read_tensor_sizes(self.path))
        remedy = "give a model with safetensors weights and without custom code"
        with _folder_errors(f"{self.path}: transformers cannot load it", remedy):
            model, report = auto_class.from_pretrained(
                self.path,
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # They are refused below, by name.
                output_loading_info=True,
                trust_remote_code=False,
                local_files_only=True,
            )
        for name, actual, expected in sorted(report["mismatched_keys"]):
            problem = f"{name} has shape {tuple(actual)}, expected {tuple(expected)} by config.json"
            raise FolderError(f"{self.path}: {problem}; download the config.json of these weights")
        return model, sorted(report["missing_keys"])


def open_model_folder(folder: Path, *, pinned: bool = False, checkpoint: str = "") -> ModelFolder:
    """Checks a folder before anything is loaded from it. Raises FolderError, which names the offending file.

    `pinned` means that the content is verified in another way (a commit, a known sha256), so its hash is not logged;
    `checkpoint` is the name of a pickle that is allowed because it is converted, not loaded.
    """
    if not folder.is_dir():
        raise FolderError(f"{folder}: no such folder; give a folder that transformers saved")
    refuse_pickles(folder, allowed=checkpoint)
    _refuse_code(folder)
    _refuse_large(folder)
    if (folder / ADAPTER).exists():
        problem = "is an adapter, which transformers ignores without peft"
        raise FolderError(f"{folder / ADAPTER}: {problem}; merge it into the weights with merge_and_unload")
    if (folder / MANIFEST).exists():
        return ModelFolder(path=folder, hash=verify_exactly(folder).hash, has_manifest=True)
    files = [file for file in describe_files(folder) if file.name not in UNLISTED_FILES]
    digest = hashlib.sha256("".join(f"{file.sha256}  {file.name}\n" for file in files).encode()).hexdigest()
    if not pinned and (folder, digest) not in _LOGGED:
        _LOGGED.add((folder, digest))
        LOGGER.warning("%s: has no manifest; loading its %d files unverified, sha256 %s", folder, len(files), digest)
    return ModelFolder(path=folder, hash=digest, has_manifest=False)


def check_size(
    folder: Path, auto_class: AutoModel[Module], config: "PreTrainedConfig", tensor_sizes: Sequence[int]
) -> None:
    """Raises FolderError if `config` describes a larger model than the weights, whose tensors have these sizes.

    The model is built on the device "meta", without memory for its tensors. transformers creates shared parameters
    (embeddings and head, encoder and decoder) separately and ties them at the end, so the limit is four times as high
    during construction.
    """
    import torch

    problem, remedy = f"{folder}: config.json does not describe a model", "give a folder that transformers saved"
    with _folder_errors(problem, remedy):
        with _limit_model_size(folder, tensor_sizes), torch.device("meta"):
            model = auto_class.from_config(config, trust_remote_code=False)
        size = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
        if size > _max_elements(tensor_sizes):
            raise _size_error(folder, size, tensor_sizes)


def verify_exactly(folder: Path) -> Manifest:
    """Returns the manifest; raises FolderError unless the folder has exactly the listed files, each with its sha256.

    Hidden files at the top (.gitattributes, .cache) and `UNLISTED_FILES` are ignored. Unlike a folder of records, the
    folder of a model must not contain other files, because transformers would read them.
    """
    manifest = verify(folder)
    listed = {file.name for file in manifest.files} | UNLISTED_FILES
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if (not path.is_dir() or path.is_symlink()) and name not in listed and not name.startswith("."):
            remedy = "delete it, or delete the folder and download it again"
            raise FolderError(f"{path}: is not in the folder's {MANIFEST}; {remedy}")
    return manifest


def refuse_pickles(folder: Path, *, allowed: str = "") -> None:
    """Raises FolderError if a file has a format that can run code when it is loaded."""
    for path in _match_files(folder, PICKLES):
        if path.name != allowed or path.parent != folder:
            remedy = "convert it to safetensors if it holds the weights, then delete it"
            raise FolderError(f"{path}: can run code when loaded; {remedy}")


def _refuse_code(folder: Path) -> None:
    """Raises FolderError if a file is code, or if a JSON file names code or files outside the folder."""
    for path in sorted(folder.rglob("*")):
        if path.is_dir() and path.is_symlink():
            raise FolderError(f"{path}: is a link to another folder; copy its files here, or delete it")
        if not path.is_dir() and not path.is_file():
            raise FolderError(f"{path}: is not a file (a pipe, a socket or a broken link); delete it")
    for path in _match_files(folder, CODE):
        raise FolderError(f"{path}: is code, which is never run from the folder of a model; delete it")
    for path in _match_files(folder, ("*.json",)):
        if not _matches(path, (*_TABLES, _INDEX)) and not (path.parent == folder and path.name in UNLISTED_FILES):
            _refuse_named_code(path, _read_json(path, MAX_CONFIG_BYTES))
    for path in _match_files(folder, (_INDEX,)):
        _check_weight_paths(path, _read_json(path, MAX_HEADER_BYTES))


def _refuse_named_code(path: Path, values: "JSON") -> None:
    for key, value in _walk_items(values):
        if key in _CODE_KEYS or (key == "trust_remote_code" and value):
            raise FolderError(f"{path}: names custom code ({key}), which is never run; remove the entry")
        is_path = path.name.startswith("tokenizer_config") and isinstance(value, str)
        if key in _FILE_KEYS or (is_path and key in _TABLE_KEYS):
            raise FolderError(f"{path}: names other files to load ({key}); remove the entry")
        if key.removeprefix("_") in _KERNEL_KEYS and "/" in str(value):
            raise FolderError(f"{path}: {key} is {quote(value)}, code from a hub; remove the entry")
        if path.name == "modules.json" and key == "type" and not str(value).startswith(_SENTENCE_TRANSFORMERS):
            raise FolderError(f"{path}: names the class {quote(value)}, which is custom code; remove the entry")
        if key in ("tokenizer_class", "architectures"):
            _refuse_unknown_class(path, key, value)
        count = value if isinstance(value, int) and not isinstance(value, bool) else 0
        if path.name.startswith("config") and count > MAX_COUNT and _COUNT_KEYS.search(key):
            raise FolderError(f"{path}: {key} is {quote(value, 20)}, above {MAX_COUNT:,}; download the folder again")


def _refuse_unknown_class(path: Path, key: str, value: "JSON") -> None:
    """Raises FolderError for a class that transformers does not have, because it would silently load another one."""
    for name in value if isinstance(value, list) else [value] if value is not None else []:
        spellings = (str(name), re.sub(r"^(TF|Flax)|Fast$", "", str(name)), f"{name}Fast")
        if not isinstance(name, str) or not any(map(_is_known_class, spellings)):
            remedy = "save it with a class that transformers has"
            raise FolderError(f"{path}: {key} {quote(name)} is not a class of transformers; {remedy}")


def _is_known_class(name: str) -> bool:
    import transformers

    with suppress(Exception):  # It exists then; loading it will name the missing package.
        return name in _REMOVED_TOKENIZERS or hasattr(transformers, name)
    return True


def _check_weight_paths(path: Path, values: "JSON") -> None:
    names = values.get("weight_map", {}) if isinstance(values, Mapping) else None
    if not isinstance(names, Mapping):
        raise FolderError(f"{path}: is not an index of weights; save the model again")
    for name in set(map(str, names.values())):
        if Path(name).name != name or name.startswith("."):  # Hidden files are not hashed.
            raise FolderError(f"{path}: names a hidden file or one elsewhere ({quote(name)}); save the model again")


def _refuse_large(folder: Path) -> None:
    for path in _match_files(folder, ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")):
        limit = MAX_TABLE_BYTES if _matches(path, (*_TABLES, "*.txt")) else MAX_CONFIG_BYTES
        limit = MAX_HEADER_BYTES if _matches(path, (_INDEX, *UNLISTED_FILES)) else limit
        if (size := path.stat().st_size) > limit:
            raise FolderError(f"{path}: has {size:,} bytes, above the limit of {limit:,}; download the folder again")


def read_tensor_sizes(folder: Path) -> list[int]:
    """Number of elements of each tensor of the weights, from the headers of the safetensors files."""
    counts: list[int] = []
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(MAX_HEADER_BYTES, size - 8):
                problem = f"is damaged or not safetensors (header of {length:,} bytes)"
                raise FolderError(f"{path}: {problem}; download it again")
            header = file.read(length)
        try:
            tensors = [tensor for name, tensor in json.loads(header).items() if name != "__metadata__"]
            sizes = [_num_elements(tensor["shape"]) for tensor in tensors]
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise FolderError(f"{path}: is damaged or not safetensors (bad header); download it again") from error
        if sum(sizes) > 8 * size:
            raise FolderError(f"{path}: its header describes more data than the file contains; download it again")
        counts += sizes
    if not counts:
        raise FolderError(f"{folder}: contains no model.safetensors; save the model with safe_serialization=True")
    return counts


def _num_elements(shape: list[int]) -> int:
    if not all(isinstance(size, int) and 0 <= size < 2**48 for size in shape):
        raise ValueError(f"a shape of {quote(shape)}")
    return math.prod(shape)


def _max_elements(tensor_sizes: Sequence[int]) -> int:
    return 2 * sum(tensor_sizes) + SPARE_ELEMENTS


def _size_error(folder: Path, size: int, tensor_sizes: Sequence[int]) -> FolderError:
    sizes = f"{size:,} parameters or more, but the weights contain {sum(tensor_sizes):,}"
    return FolderError(f"{folder}: config.json describes {sizes}; download it again")


@contextmanager
def _limit_model_size(folder: Path, tensor_sizes: Sequence[int]) -> Iterator[None]:
    """Raises FolderError as soon as a model that is built in this block is several times larger than the weights.

    Modules are counted too, because each takes memory even if its tensors are on the device "meta".
    """
    from torch.nn.modules import module as torch_module

    max_size = 4 * _max_elements(tensor_sizes)
    max_modules = 10 * len(tensor_sizes) + SPARE_MODULES
    size, modules = 0, 0

    def count_module(*_: object) -> None:
        nonlocal modules
        modules += 1
        if modules > max_modules:
            raise FolderError(f"{folder}: config.json describes more layers than the weights have; download it again")

    def count_tensor(_module: object, _name: str, tensor: "torch.Tensor | None") -> None:
        nonlocal size
        size += 0 if tensor is None else tensor.numel()
        if size > max_size:
            raise _size_error(folder, size, tensor_sizes)

    with ExitStack() as hooks:
        for handle in (
            torch_module.register_module_module_registration_hook(count_module),
            torch_module.register_module_parameter_registration_hook(count_tensor),
            torch_module.register_module_buffer_registration_hook(count_tensor),
        ):
            hooks.callback(handle.remove)
        yield


@contextmanager
def _folder_errors(problem: str, remedy: str) -> Iterator[None]:
    """Turns any exception of transformers into a FolderError of one line."""
    try:
        yield
    except FolderError:
        raise
    except BaseException as error:  # A panic of the tokenizers library (Rust) is not an Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = (" ".join(str(error).split())) or type(error).__name__
        raise FolderError(f"{problem} ({quote(reason, 160)}); {remedy}") from error


def _walk_items(values: "JSON") -> Iterator[tuple[str, "JSON"]]:
    """Every key of nested objects with its value; an item of a list has the key of the list."""
    pending: list[tuple[str, JSON]] = [("", values)]
    while pending:
        key, value = pending.pop()
        if key:
            yield key, value
        if isinstance(value, Mapping):
            pending += [(str(name), inner) for name, inner in value.items()]
        elif isinstance(value, list):
            pending += [(key, inner) for inner in value]


def _read_json(path: Path, max_bytes: int) -> "JSON":
    if path.stat().st_size > max_bytes:
        raise FolderError(f"{path}: has more than {max_bytes:,} bytes; {_JSON_REMEDY}")
    try:
        values: JSON = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise FolderError(f"{path}: is not JSON ({quote(str(error), 80)}); {_JSON_REMEDY}") from error
    return values


def _match_files(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    """Files at any depth whose names match one of the patterns, ignoring case."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and _matches(path, patterns))


def _matches(path: Path, patterns: tuple[str, ...]) -> bool:
    return any(Path(path.name.lower()).match(pattern) for pattern in patterns)
