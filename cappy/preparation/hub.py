"""Datasets of the Hugging Face hub, streamed at a pinned commit; nothing of a repository is executed."""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cappy.errors import ConfigError, shown
from cappy.hub_client import guard_client
from cappy.preparation.mixtures import CONVERTED
from cappy.preparation.rows import Rows

PREFIX = "hub:"
_FORM = re.compile(r"(?P<repository>\w[\w.-]*/\w[\w.-]*)(?::(?P<configuration>[^@]+))?(?:@(?P<revision>\S+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True, kw_only=True)
class HubDataset:
    """A repository, one of its configurations (None where it has only one), and a commit, branch or tag."""

    repository: str
    configuration: str | None = None
    revision: str = "main"

    @property
    def name(self) -> str:
        """How it is written: hub:org/name:configuration@revision."""
        configuration = f":{self.configuration}" if self.configuration else ""
        return f"{PREFIX}{self.repository}{configuration}@{self.revision}"


def parse_hub(text: str) -> HubDataset:
    """The dataset that hub:org/name[:configuration][@revision] names; ConfigError for another form."""
    found = _FORM.fullmatch(text.removeprefix(PREFIX))
    if found is None:
        form = "hub:org/name, hub:org/name:configuration or hub:org/name:configuration@revision"
        raise ConfigError(f"{shown(text)}: no dataset of the hub; write {form}")
    known = {key: value for key, value in found.groupdict().items() if value}
    return HubDataset(**known)


def commit_of(dataset: HubDataset) -> str:
    """The commit that its revision is now; a commit is itself, and the hub is not asked."""
    if _COMMIT.fullmatch(dataset.revision):
        return dataset.revision
    from huggingface_hub import HfApi

    guard_client()
    with _hub_errors(dataset):
        found = str(HfApi().dataset_info(dataset.repository, revision=dataset.revision).sha)
        if not _COMMIT.fullmatch(found):
            raise ValueError(f"it answers with {shown(found, 50)}, which is no commit")
        return found


def read_hub(dataset: HubDataset, commit: str, split: str) -> Rows:
    """The rows of one split as they come, in the hub's order; only what is read is fetched."""
    import datasets

    # datasets would take a folder of this name for the repository, at whatever commit.
    if Path(dataset.repository).exists():
        remedy = "run elsewhere, or give the file in it as --source"
        raise ConfigError(
            f"{dataset.name}: a folder {dataset.repository} of this machine hides the repository; {remedy}"
        )
    guard_client()
    where = f"{dataset.name} {split}"
    # On the converted branch a configuration is a folder and has no name (tried with datasets 5.2).
    key = "data_dir" if dataset.revision == CONVERTED else "name"
    chosen = {key: dataset.configuration} if dataset.configuration else {}
    with _hub_errors(dataset):
        rows = datasets.load_dataset(dataset.repository, revision=commit, split=split, streaming=True, **chosen)
        # Pictures and sounds stay bytes: to decode one opens whatever path the row names.
        rows = rows.decode(False)
        for number, row in enumerate(rows, start=1):
            yield f"{where}: row {number}", row


@contextlib.contextmanager
def _hub_errors(dataset: HubDataset) -> Iterator[None]:
    try:
        yield
    except (ConfigError, GeneratorExit):
        raise
    except Exception as error:  # whatever the hub's clients raise: they have a dozen kinds, of four libraries
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        remedy = "check its name, configuration, split and revision, and the network"
        raise ConfigError(f"{dataset.name}: cannot be read from the hub ({shown(reason, 160)}); {remedy}") from error
