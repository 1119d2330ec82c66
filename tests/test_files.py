"""Locks, files that appear whole, and folders of their owner alone."""

import errno
import fcntl
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filelock import Timeout

from cappy.errors import FolderError
from cappy.files import atomic_write, hold_lock, lock_holder, make_private, open_lock
from cappy.records import Manifest
from cappy.records.folder import File, link_or_copy, publish, sha256_of, write_bytes
from cappy.records.work import claim
from cappy.registry.client import connect
from cappy.sampling.endpoint.answers import Answer as EndpointAnswer
from cappy.sampling.endpoint.answers import AnswerCache
from cappy.training.corpus import _lock
from cappy.worker import hold_parent_lock
from pipelines.clients.local import _is_locked as run_is_held
from serving.gateway.feedback import AppendableDataset, FeedbackRow


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture(params=[0o000, 0o022, 0o077], ids=["umask 000", "umask 022", "umask 077"])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def hold_work(folder: Path) -> None:
    with claim(folder, "annotation", {}):
        pass


def hold_tokens(folder: Path) -> None:
    with _lock(folder, "key"):
        pass


def hold_registry(folder: Path) -> None:
    with connect(f"sqlite:///{folder}/mlflow.db"):
        pass


def hold_run(folder: Path) -> None:
    os.close(hold_parent_lock(folder / "parent.lock"))


def look_at_run(folder: Path) -> None:
    run_is_held(folder / "parent.lock")


def hold_feedback(folder: Path) -> None:
    AppendableDataset(folder).close()


LOCKS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "tokens": (".key.lock", hold_tokens),
    "registry": (".mlflow.db.lock", hold_registry),
    "run": ("parent.lock", hold_run),
    "look at a run": ("parent.lock", look_at_run),
    "feedback": (".lock", hold_feedback),
}


@pytest.mark.parametrize("name", LOCKS)
def test_no_lock_is_opened_through_a_symbolic_link(name: str, tmp_path: Path) -> None:
    file, hold = LOCKS[name]
    victim = tmp_path / "victim"
    victim.write_text("what matters")
    folder = tmp_path / "shared"
    folder.mkdir()
    (folder / file).symlink_to(victim)
    with pytest.raises(FolderError, match=rf"^\S*{file}: .*lock file.*symbolic link; delete"):
        hold(folder)
    assert victim.read_text() == "what matters"


def test_the_lock_of_a_piece_of_work_does_not_overwrite_what_a_link_names(tmp_path: Path) -> None:
    with claim(tmp_path / "work", "annotation", {}) as folder:
        pass
    victim = tmp_path / "victim"
    victim.write_text("what matters")
    for link in (os.symlink, os.link):
        (folder / ".lock").unlink()
        link(victim, folder / ".lock")
        with pytest.raises(FolderError, match="lock: .*link"), claim(tmp_path / "work", "annotation", {}):
            pytest.fail("it is not a lock")
    assert victim.read_text() == "what matters"


def test_a_link_that_leads_nowhere_makes_no_file_there(tmp_path: Path) -> None:
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FolderError, match="lock: .*symbolic link"):
        open_lock(tmp_path / "lock")
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_is_refused_at_once_as_a_lock(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "lock")
    with pytest.raises(FolderError, match="regular file"):
        open_lock(tmp_path / "lock")
    with pytest.raises(FolderError, match="regular file"), hold_lock(tmp_path / "lock"):
        pytest.fail("it is not a lock")


def test_a_lock_is_its_owners_alone_and_no_child_inherits_it(umask: int, tmp_path: Path) -> None:
    with open_lock(tmp_path / "lock") as file:
        assert mode(tmp_path / "lock") == 0o600
        assert not os.get_inheritable(file.fileno())
        with open_lock(tmp_path / "lock") as other:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with pytest.raises(BlockingIOError):
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_lock_that_is_held_is_its_owners_alone_and_names_the_process(umask: int, tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with hold_lock(path):
        assert mode(path) == 0o600
        assert lock_holder(path) == str(os.getpid())
        held = [number for number in range(256) if _is_open(number, path)]
        assert len(held) == 1
        assert not os.get_inheritable(held[0])
        with pytest.raises(Timeout), hold_lock(path, timeout=0):
            pytest.fail("it is held")
        with open_lock(path) as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    with hold_lock(path, timeout=0):
        pass


def _is_open(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False


def test_a_disk_without_the_kernels_locks_is_no_place_for_a_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lock by a file's being there would stay when its process is killed."""

    def missing(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", missing)
    with pytest.raises(OSError, match="not implemented"), hold_lock(tmp_path / "lock"):
        pytest.fail("it is not a lock")


def test_every_lock_of_the_project_is_opened_in_one_place() -> None:
    """flock, on a file that something else opened, is how the next one would come in."""
    root = Path(__file__).parents[1]
    for package in ("cappy", "serving", "pipelines", "components", "docker"):
        for path in (root / package).rglob("*.py"):
            text = path.read_text()
            assert "flock(" not in text or "open_lock(" in text, path
            assert "FileLock(" not in text or path.name == "files.py", path
            assert "lockf(" not in text, path


def test_the_feedback_log_is_its_owners_alone_before_and_after_it_is_written_anew(umask: int, tmp_path: Path) -> None:
    folder = tmp_path / "log" / "answers"
    dataset = AppendableDataset(folder)
    for number in range(2):
        dataset.put(
            FeedbackRow(instance_id=f"{number}", instruction="a secret", candidates=(), group_id="g", split="train")
        )
        dataset.flush()
        assert {path.name: mode(path) for path in folder.iterdir()} == dict.fromkeys(
            (".lock", "manifest.json", f"part-{number:05d}.parquet"), 0o600
        )
    dataset.close()
    assert mode(folder) == 0o700


def test_answers_of_an_endpoint_are_kept_for_their_owner_alone(umask: int, tmp_path: Path) -> None:
    cache = AnswerCache(tmp_path / "answers")
    cache.put("ab" * 32, EndpointAnswer(text="a secret", status="ok"))
    cache.close()
    kept = [path for path in (tmp_path / "answers").rglob("*") if path.is_file()]
    assert len(kept) == 2
    assert {mode(path) for path in kept} == {0o600}


def test_nobody_else_enters_a_folder_of_work_and_what_is_published_has_the_usual_rights(
    umask: int, tmp_path: Path
) -> None:
    with claim(tmp_path / "work", "annotation", {}) as folder:
        assert mode(folder) == 0o700
        write_bytes(folder / "part-00000.parquet", b"rows")
        file = File(name="part-00000.parquet", sha256=sha256_of(folder / "part-00000.parquet"))
        publish(folder, tmp_path / "target", Manifest(step="step", files=(file,)))
    assert mode(tmp_path / "target" / file.name) == 0o666 & ~umask
    assert mode(tmp_path / "target") == 0o777 & ~umask


def test_a_private_folder_that_is_there_keeps_the_rights_that_its_owner_gave_it(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o750)
    make_private(tmp_path / "open")
    assert mode(tmp_path / "open") == 0o750


def test_a_file_that_lies_under_the_temporary_name_is_neither_written_nor_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cappy.files.secrets.token_hex", lambda _: "known")
    planted = tmp_path / ".file.known.tmp"
    planted.write_text("planted")
    with pytest.raises(FileExistsError), atomic_write(tmp_path / "file") as file:
        file.write(b"secret")
    assert planted.read_text() == "planted"
    assert not (tmp_path / "file").exists()


def test_the_temporary_name_of_a_file_cannot_be_foreseen(tmp_path: Path) -> None:
    names = set()
    for _ in range(8):
        with atomic_write(tmp_path / "report.json") as file:
            names |= {path.name for path in tmp_path.iterdir()} - {"report.json"}
            file.write(b"{}")
    assert len(names) == 8
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_a_file_that_fails_halfway_leaves_the_old_one_and_nothing_beside_it(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("old")
    with pytest.raises(TypeError), atomic_write(tmp_path / "report.json") as file:
        file.writelines([b"half", "no bytes"])  # type: ignore[list-item]
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def without_links(*_: object) -> None:
    raise OSError(1, "Operation not permitted")


def test_publishing_replaces_a_link_and_writes_through_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where hard links are not to be had, a copy is made: under a name of its own, which takes the link's place."""
    victim, source, target = tmp_path / "victim", tmp_path / "work" / "new", tmp_path / "target"
    victim.write_text("what matters")
    write_bytes(source, b"rows")
    target.mkdir()
    unlink = Path.unlink

    def race(path: Path, missing_ok: bool = False) -> None:
        """Someone puts the link back as soon as it is gone."""
        unlink(path, missing_ok=missing_ok)
        if path == target / "new":
            path.symlink_to(victim)

    monkeypatch.setattr(os, "link", without_links)
    monkeypatch.setattr(Path, "unlink", race)
    link_or_copy(source, target / "new")
    assert victim.read_text() == "what matters"
    assert (target / "new").read_text() == "rows"
    assert not (target / "new").is_symlink()


def test_publishing_follows_no_link_to_a_folder_out_of_the_target(tmp_path: Path) -> None:
    work, target, outside = tmp_path / "work", tmp_path / "target", tmp_path / "outside"
    write_bytes(work / "scorer" / "config.json", b"{}")
    target.mkdir()
    outside.mkdir()
    (target / "scorer").symlink_to(outside)
    file = File(name="scorer/config.json", sha256=sha256_of(work / "scorer" / "config.json"))
    with pytest.raises(FolderError, match="scorer: .*symbolic link"):
        publish(work, target, Manifest(step="step", files=(file,)))
    assert list(outside.iterdir()) == []
