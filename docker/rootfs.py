"""Copies the files that a Python program needs into a new folder: python3 rootfs.py FOLDER.

These are the interpreter and its standard library, the environment /app, the shared libraries that these load,
certificates and a user. It runs in the image that it copies from, with Debian's Python or the official image's.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

ENVIRONMENT = Path("/app")
PROGRAMS = re.compile(r"python[\d.]*|cappy")
"""Programs of the environment that are copied; the others come with packages and are not used."""
UNUSED_MODULES = (
    "ensurepip",
    "venv",
    "idlelib",
    "tkinter",
    "turtledemo",
    "lib2to3",
    "test",
    "pydoc_data",
    "site-packages",
)
"""Modules of the standard library that are not copied."""
UNUSED_IN_PACKAGES = {"tests", "include"}
"""Folders of packages that are not copied: tests, C headers."""
EXTRA_FILES = (Path("/etc/ssl/certs/ca-certificates.crt"), Path("/etc/ld.so.cache"))
"""Certificates, and the loader's cache, since the official image has libpython in /usr/local."""
USER = "cappy:x:10001:10001:cappy:/tmp:/usr/sbin/nologin\n"


def main(target: Path) -> None:
    """Creates and fills the folder."""
    target.mkdir()
    for name in ("lib", "lib64"):
        if Path("/", name).is_symlink():
            (target / name).symlink_to(Path("/", name).readlink())
    interpreter = Path(sys.executable).resolve()
    library = Path(sysconfig.get_path("stdlib"))
    copy_file(interpreter, target)
    shutil.copytree(library, path_in_copy(target, library), symlinks=True, ignore=ignore_library(library))
    shutil.copytree(ENVIRONMENT, path_in_copy(target, ENVIRONMENT), symlinks=True, ignore=ignore_packages)
    for link in interpreter_links((ENVIRONMENT / "bin").iterdir()):
        copy_link(link, target)
    copied = [path for path in target.rglob("*") if path.is_file() and not path.is_symlink()]
    originals = [Path("/", path.relative_to(target)) for path in copied]
    for path in sorted(shared_libraries(path for path in originals if is_binary(path))):
        copy_link(path, target)
    for path in EXTRA_FILES:
        copy_file(path, target)
    (target / "etc/passwd").write_text("root:x:0:0:root:/root:/usr/sbin/nologin\n" + USER)
    (target / "etc/group").write_text("root:x:0:\ncappy:x:10001:\n")
    (target / "etc/nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files dns\n")
    (target / "tmp").mkdir(mode=0o777)
    (target / "tmp").chmod(0o1777)
    (target / "data").mkdir()
    os.chown(target / "data", 10001, 10001)


def path_in_copy(target: Path, path: Path) -> Path:
    """The path in the copy of a path of this file system; creates its parent folder."""
    target_path = target / path.relative_to("/")
    target_path.parent.mkdir(parents=True, exist_ok=True)
    return target_path


def copy_file(path: Path, target: Path) -> None:
    """Copies a file, unless it was copied already."""
    if not (target_path := path_in_copy(target, path)).exists():
        shutil.copy2(path, target_path)


def copy_link(path: Path, target: Path) -> None:
    """Copies a file and every link on the way to it."""
    path = path.parent.resolve() / path.name
    target_path = path_in_copy(target, path)
    if path.is_symlink():
        if not target_path.is_symlink():
            target_path.symlink_to(path.readlink())
        copy_link(path.parent / path.readlink(), target)
    else:
        copy_file(path, target)


def interpreter_links(paths: Iterable[Path]) -> Iterator[Path]:
    """The programs of the environment that are links to the interpreter."""
    return (path for path in paths if path.is_symlink() and PROGRAMS.fullmatch(path.name))


def ignore_library(library: Path) -> Callable[[str, list[str]], set[str]]:
    """The `ignore` function of copytree for the standard library."""

    def ignored(folder: str, entries: list[str]) -> set[str]:
        return set(entries) & set(UNUSED_MODULES) if Path(folder) == library else set()

    return ignored


def ignore_packages(folder: str, entries: list[str]) -> set[str]:
    """The `ignore` function of copytree for the environment."""
    if Path(folder) == ENVIRONMENT / "bin":
        return {name for name in entries if not PROGRAMS.fullmatch(name)}
    return {name for name in entries if name in UNUSED_IN_PACKAGES or name.endswith(".a")}


def is_binary(path: Path) -> bool:
    """Whether a file is an ELF program or library."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"\x7fELF"


def shared_libraries(binaries: Iterable[Path]) -> set[Path]:
    """The loader and the system libraries that these binaries load; those in the environment are copied already."""
    loader = next(path for pattern in ("lib64", "lib") for path in Path("/", pattern).glob("ld-linux*.so*"))
    libraries = {loader}
    for binary in binaries:
        output = subprocess.run(
            [str(loader), "--list", str(binary)], capture_output=True, text=True, check=False
        ).stdout
        libraries |= {Path(path) for path in re.findall(r"=> (/\S+) \(", output)}
    return {path for path in libraries if not path.is_relative_to(ENVIRONMENT)}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
