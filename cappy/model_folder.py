"""A folder that holds a model: what may be loaded from it, and the only calls that load it.

transformers runs Python that a folder names, takes any tokenizer file that lies beside the weights, and builds whatever
sizes config.json states. So every loader of the project opens a folder here first:

- a folder with a manifest holds exactly the files that the manifest lists, each with its sha256; one without is hashed
  as it was found, and the hash is logged;
- no file and no key of a JSON file may name code;
- no file is larger than its kind needs, and config.json describes no more parameters than the weights hold.
"""

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from cappy.errors import FolderError, quote
from cappy.records.folder import MANIFEST, Manifest, describe_files, verify
from cappy.tokenizer_bounds import refuse_growth

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from cappy.untrusted import JSON

LOGGER = logging.getLogger(__name__)
_LOGGED: set[tuple[Path, str]] = set()
"""Folders whose hash was logged by this process."""

PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt", "*.npy", "*.joblib", "*.msgpack")
ADAPTER = "adapter_config.json"
CODE = ("*.py", "*.pyc", "*.pyd", "*.so", "*.dll", "*.dylib")
BESIDE_MANIFEST = frozenset({MANIFEST, "calibration.json", "probe.json", "out_of_fold.json"})
"""Files that may lie in a folder although its manifest does not list them: an evaluation writes them after it.

Those of a registered version have a sha256 of their own in its tags.
"""

MAX_CONFIG_BYTES = 4 * 2**20
"""Of a template, and of a JSON file that is not a vocabulary; the largest seen have a few hundred kilobytes."""
MAX_TABLE_BYTES = 128 * 2**20
"""Of tokenizer.json, a vocabulary or merges; Gemma's have 33 MB."""
MAX_HEADER_BYTES = 16 * 2**20
"""Of a safetensors header: about 150,000 tensors."""
MAX_COUNT = 100_000
"""Of layers, heads, experts or labels in config.json: transformers builds lists of that length when it reads it."""
SPARE_ELEMENTS = 2**26
"""Elements that a model may have beyond twice those of its weights: a new head, tables of positions."""
SPARE_MODULES = 10_000

_TABLES = ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "added_tokens.json", "*.model", "*.tiktoken")
_INDEX = "*.safetensors.index.json"
_COUNT_KEYS = re.compile(r"^_?num_|(layers?|heads?|experts?|labels|blocks?|stages?|depths?)$")
_CODE_KEYS = frozenset({"auto_map", "custom_pipelines", "custom_generate"})
_FILE_KEYS = frozenset({"configuration_files", "fast_tokenizer_files", "transformers_weights"})
"""Keys by which transformers reads other files than those with the usual names."""
_TABLE_KEYS = frozenset({"vocab", "merges"})
"""Keys of tokenizer_config.json that hold tables; transformers reads a string there as the path of any file."""
_KERNEL_KEYS = frozenset({"attn_implementation", "experts_implementation"})
_SENTENCE_TRANSFORMERS = "sentence_transformers."
_NOT_THE_MODELS = "delete it if it is not a file of the model, else get the folder again"
_REMOVED_TOKENIZERS = frozenset({"BloomTokenizer"})
"""Classes that transformers 5 no longer has, and still loads as its general tokenizer (`tokenizer_class_from_name`)."""


class Module(Protocol):
    """What is used here of a model, which is a module of torch."""

    def parameters(self) -> "Iterator[torch.nn.Parameter]":
        """All parameters, a shared one once."""

    def buffers(self) -> "Iterator[torch.Tensor]":
        """Tensors that are not parameters."""


Model_co = TypeVar("Model_co", bound=Module, covariant=True)


class AutoModel(Protocol[Model_co]):
    """What is used of transformers' AutoModelFor... classes, which all make models of one kind."""

    def from_config(self, config: "PreTrainedConfig", *, trust_remote_code: bool) -> Model_co:
        """A model with random weights."""

    def from_pretrained(
        self,
        folder: Path,
        *,
        config: "PreTrainedConfig",
        dtype: "torch.dtype",
        use_safetensors: bool,
        output_loading_info: bool,
        trust_remote_code: bool,
        local_files_only: bool,
    ) -> tuple[Model_co, Mapping[str, Iterable[str]]]:
        """The model of a folder, and names of parameters by what became of them."""


@dataclass(frozen=True, kw_only=True)
class ModelFolder:
    """A checked folder. `hash` (64 hexadecimal digits) changes with every file, `listed` says whether a manifest lists
    them.
    """

    path: Path
    hash: str
    listed: bool

    def config(self) -> "PreTrainedConfig":
        """The configuration as transformers reads it; FolderError where it is not that of a model."""
        from transformers import AutoConfig

        if not (self.path / "config.json").is_file():
            raise FolderError(f"{self.path}: has no config.json; give a folder that transformers saved")
        remedy = "give a folder that transformers saved (config.json with its model_type)"
        with _one_line(f"{self.path}: its config.json is not that of a model", remedy):
            return AutoConfig.from_pretrained(self.path, trust_remote_code=False, local_files_only=True)

    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer; FolderError where there is none that transformers can read."""
        from transformers import AutoTokenizer

        with _one_line(f"{self.path}: its tokenizer cannot be read", "save the tokenizer beside the weights again"):
            tokenizer = AutoTokenizer.from_pretrained(self.path, trust_remote_code=False, local_files_only=True)
            refuse_growth(tokenizer)
            return tokenizer

    def model(self, auto_class: AutoModel[Model_co], config: "PreTrainedConfig") -> tuple[Model_co, list[str]]:
        """The model in fp32 on the CPU, and the names of parameters that the weights lack, which are random.

        `auto_class` is one of transformers' AutoModelFor... classes. FolderError where config.json describes a larger
        model than the weights hold, or where transformers cannot load it.
        """
        import torch

        check_size(self.path, auto_class, config, _elements(self.path))
        remedy = "it must be a model with its weights as safetensors, without code of its own"
        with _one_line(f"{self.path}: transformers cannot load it", remedy):
            model, report = auto_class.from_pretrained(
                self.path,
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                output_loading_info=True,
                trust_remote_code=False,
                local_files_only=True,
            )
        return model, sorted(report["missing_keys"])


def open_model_folder(folder: Path, *, pinned: bool = False, checkpoint: str = "") -> ModelFolder:
    """Checks a folder before anything is loaded from it; FolderError names the file that must not be there.

    `pinned` says that the content is known by other means (a commit, a seal), so the hash is not logged; `checkpoint`
    is the one pickle that may lie there, because it is converted and not loaded.
    """
    if not folder.is_dir():
        raise FolderError(f"{folder}: no such folder; give a folder that transformers saved")
    _refuse_pickles(folder, allowed=checkpoint)
    _refuse_code(folder)
    _refuse_large(folder)
    if (folder / ADAPTER).exists():
        remedy = "merge it into the weights (merge_and_unload)"
        raise FolderError(f"{folder / ADAPTER}: is an adapter, which counts only where peft is installed; {remedy}")
    if (folder / MANIFEST).exists():
        return ModelFolder(path=folder, hash=verify_exactly(folder).hash, listed=True)
    files = describe_files(folder)
    digest = hashlib.sha256("".join(f"{file.sha256}  {file.name}\n" for file in files).encode()).hexdigest()
    if not pinned and (folder, digest) not in _LOGGED:
        _LOGGED.add((folder, digest))
        LOGGER.warning("%s: has no manifest; its %d files are loaded as found, sha256 %s", folder, len(files), digest)
    return ModelFolder(path=folder, hash=digest, listed=False)


def check_size(
    folder: Path, auto_class: AutoModel[Module], config: "PreTrainedConfig", elements: Sequence[int]
) -> None:
    """FolderError where a configuration describes a larger model than weights whose tensors have so many `elements`.

    The model is built without memory for its tensors (on the device "meta"), and no further than that takes. Parameters
    that it shares (embeddings and head, encoder and decoder) are made once each and tied at the end, so the limit
    holds for the finished model; while it is built it is four times as large.
    """
    import torch

    text, remedy = f"{folder}: its config.json is not that of a model", "give a folder that transformers saved"
    with _one_line(text, remedy):
        with _limit_model_size(folder, elements), torch.device("meta"):
            model = auto_class.from_config(config, trust_remote_code=False)
        size = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
        if size > _most_elements(elements):
            raise _too_large(folder, size, elements)


def verify_exactly(folder: Path) -> Manifest:
    """The manifest of a folder that holds exactly the files that it lists, each with its sha256, else FolderError.

    What is hidden at its top (.gitattributes, .cache) is left out of this, and `BESIDE_MANIFEST`. A record's folder may
    hold other files, a model's may not: transformers would read them.
    """
    manifest = verify(folder)
    listed = {file.name for file in manifest.files} | BESIDE_MANIFEST
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if (not path.is_dir() or path.is_symlink()) and name not in listed and not name.startswith("."):
            remedy = "delete it, or delete the folder and get it again"
            raise FolderError(f"{path}: is not in the folder's {MANIFEST}; {remedy}")
    return manifest


def _refuse_pickles(folder: Path, *, allowed: str = "") -> None:
    """FolderError where a file of the folder is of a format that can run code when it is loaded."""
    for path in _match_files(folder, PICKLES):
        if path.name != allowed or path.parent != folder:
            remedy = "convert it to safetensors if it holds the weights, then delete it"
            raise FolderError(f"{path}: is of a format that can run code when loaded; {remedy}")


def _refuse_code(folder: Path) -> None:
    """FolderError where a file is code, or where a JSON file names code to run or files elsewhere to read."""
    for path in sorted(folder.rglob("*")):
        if path.is_dir() and path.is_symlink():
            raise FolderError(f"{path}: is a link to a folder elsewhere; copy its files here, or delete it")
        if not path.is_dir() and not path.is_file():
            raise FolderError(f"{path}: is not a file (a pipe, a socket or a broken link); delete it")
    for path in _match_files(folder, CODE):
        raise FolderError(f"{path}: is code, which is never run from a model's folder; delete it")
    for path in _match_files(folder, ("*.json",)):
        if not _is_any(path, (*_TABLES, _INDEX)) and not (path.parent == folder and path.name in BESIDE_MANIFEST):
            _refuse_named_code(path, _json(path, MAX_CONFIG_BYTES))
    for path in _match_files(folder, (_INDEX,)):
        _refuse_outside(path, _json(path, MAX_HEADER_BYTES))


def _refuse_named_code(path: Path, values: "JSON") -> None:
    for key, value in _items(values):
        if key in _CODE_KEYS or (key == "trust_remote_code" and value):
            raise FolderError(f"{path}: asks for code of its own ({key}), which is never run; remove the entry")
        texts = path.name.startswith("tokenizer_config") and isinstance(value, str)
        if key in _FILE_KEYS or (texts and key in _TABLE_KEYS):
            raise FolderError(f"{path}: names other files to load ({key}); remove the entry")
        if key.removeprefix("_") in _KERNEL_KEYS and "/" in str(value):
            raise FolderError(f"{path}: {key} is {quote(value)}, code from a hub; remove the entry")
        if path.name == "modules.json" and key == "type" and not str(value).startswith(_SENTENCE_TRANSFORMERS):
            raise FolderError(f"{path}: names the class {quote(value)}, which is code of its own; remove the entry")
        if key in ("tokenizer_class", "architectures"):
            _refuse_unknown_class(path, key, value)
        count = value if isinstance(value, int) and not isinstance(value, bool) else 0
        if path.name.startswith("config") and count > MAX_COUNT and _COUNT_KEYS.search(key):
            raise FolderError(f"{path}: {key} is {quote(value, 20)}, above {MAX_COUNT:,}; get the folder again")


def _refuse_unknown_class(path: Path, key: str, value: "JSON") -> None:
    """FolderError for a class that transformers does not have: it would silently load another one."""
    for name in value if isinstance(value, list) else [value] if value is not None else []:
        bare = re.sub(r"^(TF|Flax)|Fast$", "", str(name))
        spellings = (str(name), bare, f"{name}Fast")
        if not isinstance(name, str) or not any(map(_is_known_class, spellings)):
            remedy = "save it with a class that transformers has"
            raise FolderError(f"{path}: {key} {quote(name)} is not a class of transformers; {remedy}")


def _is_known_class(name: str) -> bool:
    import transformers

    try:
        return name in _REMOVED_TOKENIZERS or hasattr(transformers, name)
    except Exception:  # noqa: BLE001 (it is there; loading it will say which package it misses)
        return True


def _refuse_outside(path: Path, values: "JSON") -> None:
    names = values.get("weight_map", {}) if isinstance(values, Mapping) else None
    if not isinstance(names, Mapping):
        raise FolderError(f"{path}: is not an index of weights; save the model again")
    for name in set(map(str, names.values())):
        # A hidden file is not hashed.
        if Path(name).name != name or name.startswith("."):
            raise FolderError(
                f"{path}: names weights outside the folder, or hidden ones ({quote(name)}); save the model again"
            )


def _refuse_large(folder: Path) -> None:
    for path in _match_files(folder, ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")):
        most = MAX_TABLE_BYTES if _is_any(path, (*_TABLES, "*.txt")) else MAX_CONFIG_BYTES
        most = MAX_HEADER_BYTES if _is_any(path, (_INDEX, *BESIDE_MANIFEST)) else most
        if (size := path.stat().st_size) > most:
            raise FolderError(f"{path}: has {size:,} bytes, above {most:,} for such a file; get the folder again")


def _elements(folder: Path) -> list[int]:
    """How many elements each tensor of the weights has, from the headers of the safetensors files."""
    counts: list[int] = []
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(MAX_HEADER_BYTES, size - 8):
                raise FolderError(
                    f"{path}: is not safetensors, or damaged (a header of {length:,} bytes); get it again"
                )
            header = file.read(length)
        try:
            tensors = [tensor for name, tensor in json.loads(header).items() if name != "__metadata__"]
            sizes = [_product(tensor["shape"]) for tensor in tensors]
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise FolderError(f"{path}: is damaged, or not safetensors (its header); get it again") from error
        if sum(sizes) > 8 * size:
            raise FolderError(f"{path}: its header describes more than the file holds; get it again")
        counts += sizes
    if not counts:
        raise FolderError(f"{folder}: holds no model.safetensors; save the model with safe_serialization=True")
    return counts


def _product(shape: list[int]) -> int:
    total = 1
    for size in shape:
        if not isinstance(size, int) or not 0 <= size < 2**48:
            raise ValueError(f"a size of {quote(size)}")
        total *= size
    return total


def _most_elements(elements: Sequence[int]) -> int:
    return 2 * sum(elements) + SPARE_ELEMENTS


def _too_large(folder: Path, size: int, elements: Sequence[int]) -> FolderError:
    held = f"the weights hold {sum(elements):,}"
    return FolderError(f"{folder}: config.json describes over {size:,} parameters, {held}; get it again")


@contextmanager
def _limit_model_size(folder: Path, elements: Sequence[int]) -> Iterator[None]:
    """Inside, a model that is built may be a few times larger than the weights: FolderError as soon as it grows beyond.

    Modules are counted too: each takes memory, even where its tensors take none.
    """
    from torch.nn.modules import module as torch_module

    most = 4 * _most_elements(elements)
    most_modules = 10 * len(elements) + SPARE_MODULES
    size, modules = 0, 0

    def count_module(*_: object) -> None:
        nonlocal modules
        modules += 1
        if modules > most_modules:
            raise FolderError(f"{folder}: config.json describes more layers than the weights hold; get it again")

    def count_tensor(_module: object, _name: str, tensor: "torch.Tensor | None") -> None:
        nonlocal size
        size += 0 if tensor is None else tensor.numel()
        if size > most:
            raise _too_large(folder, size, elements)

    with ExitStack() as hooks:
        for handle in (
            torch_module.register_module_module_registration_hook(count_module),
            torch_module.register_module_parameter_registration_hook(count_tensor),
            torch_module.register_module_buffer_registration_hook(count_tensor),
        ):
            hooks.callback(handle.remove)
        yield


@contextmanager
def _one_line(text: str, remedy: str) -> Iterator[None]:
    """Turns whatever transformers raises about a foreign folder into a FolderError of one line."""
    try:
        yield
    except FolderError:
        raise
    except BaseException as error:
        # A panic of the tokenizers library (Rust) is a BaseException.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = (" ".join(str(error).split())) or type(error).__name__
        raise FolderError(f"{text} ({quote(reason, 160)}); {remedy}") from error


def _items(values: "JSON") -> Iterator[tuple[str, "JSON"]]:
    """Every key of an object with its value, however deep; an item of a list has the key of the list."""
    left: list[tuple[str, JSON]] = [("", values)]
    while left:
        key, value = left.pop()
        if key:
            yield key, value
        if isinstance(value, Mapping):
            left += [(str(name), inner) for name, inner in value.items()]
        elif isinstance(value, list):
            left += [(key, inner) for inner in value]


def _json(path: Path, most: int) -> "JSON":
    if path.stat().st_size > most:
        raise FolderError(f"{path}: has more than {most:,} bytes; {_NOT_THE_MODELS}")
    try:
        values: JSON = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise FolderError(f"{path}: is not JSON ({quote(str(error), 80)}); {_NOT_THE_MODELS}") from error
    return values


def _match_files(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    """The files whose names match, in any case of letters."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and _is_any(path, patterns))


def _is_any(path: Path, patterns: tuple[str, ...]) -> bool:
    return any(Path(path.name.lower()).match(pattern) for pattern in patterns)
