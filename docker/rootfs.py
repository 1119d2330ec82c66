"""Copies what a Python program needs of this file system into an empty folder: python3 rootfs.py FOLDER.

The interpreter and its standard library, the environment /app, the shared libraries that these load, certificates
and a user. Runs in the image that it copies from, under any layout of Python (Debian's or the official image's).
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
"""Of the environment's programs; the others come with packages and nothing calls them."""
UNUSED = ("ensurepip", "venv", "idlelib", "tkinter", "turtledemo", "lib2to3", "test", "pydoc_data", "site-packages")
"""Of the standard library: package managers, screens, tests."""
UNWANTED = {"tests", "include"}
"""Of the environment: packages' own tests, headers for compilers."""
KEPT = (Path("/etc/ssl/certs/ca-certificates.crt"), Path("/etc/ld.so.cache"))
"""Certificates, and where the loader looks beside its own folders (the official image has libpython in /usr/local)."""
USER = "cappy:x:10001:10001:cappy:/tmp:/usr/sbin/nologin\n"


def main(target: Path) -> None:
    """Fills the folder."""
    target.mkdir()
    for name in ("lib", "lib64"):
        if Path("/", name).is_symlink():
            (target / name).symlink_to(Path("/", name).readlink())
    interpreter = Path(sys.executable).resolve()
    library = Path(sysconfig.get_path("stdlib"))
    copy_file(interpreter, target)
    shutil.copytree(library, under(target, library), symlinks=True, ignore=ignore_library(library))
    shutil.copytree(ENVIRONMENT, under(target, ENVIRONMENT), symlinks=True, ignore=ignore_packages)
    for link in links((ENVIRONMENT / "bin").iterdir()):
        copy_link(link, target)
    copied = [path for path in target.rglob("*") if path.is_file() and not path.is_symlink()]
    originals = [Path("/", path.relative_to(target)) for path in copied]
    for path in sorted(shared_libraries(path for path in originals if is_binary(path))):
        copy_link(path, target)
    for path in KEPT:
        copy_file(path, target)
    (target / "etc/passwd").write_text("root:x:0:0:root:/root:/usr/sbin/nologin\n" + USER)
    (target / "etc/group").write_text("root:x:0:\ncappy:x:10001:\n")
    (target / "etc/nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files dns\n")
    (target / "tmp").mkdir(mode=0o777)
    (target / "tmp").chmod(0o1777)
    (target / "data").mkdir()
    os.chown(target / "data", 10001, 10001)


def under(target: Path, path: Path) -> Path:
    """Where a path of this file system lies in the copy, its folder made."""
    place = target / path.relative_to("/")
    place.parent.mkdir(parents=True, exist_ok=True)
    return place


def copy_file(path: Path, target: Path) -> None:
    """A file as it is, once."""
    if not (place := under(target, path)).exists():
        shutil.copy2(path, place)


def copy_link(path: Path, target: Path) -> None:
    """A file, and every link on the way to it."""
    path = path.parent.resolve() / path.name
    place = under(target, path)
    if path.is_symlink():
        if not place.is_symlink():
            place.symlink_to(path.readlink())
        copy_link(path.parent / path.readlink(), target)
    else:
        copy_file(path, target)


def links(paths: Iterable[Path]) -> Iterator[Path]:
    """Those of the environment's programs that are links to the interpreter."""
    return (path for path in paths if path.is_symlink() and PROGRAMS.fullmatch(path.name))


def ignore_library(library: Path) -> Callable[[str, list[str]], set[str]]:
    """What of the standard library stays behind."""

    def names(folder: str, found: list[str]) -> set[str]:
        return set(found) & set(UNUSED) if Path(folder) == library else set()

    return names


def ignore_packages(folder: str, found: list[str]) -> set[str]:
    """What of the environment stays behind."""
    if Path(folder) == ENVIRONMENT / "bin":
        return {name for name in found if not PROGRAMS.fullmatch(name)}
    return {name for name in found if name in UNWANTED or name.endswith(".a")}


def is_binary(path: Path) -> bool:
    """Whether a file is a program or a library of Linux."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"\x7fELF"


def shared_libraries(binaries: Iterable[Path]) -> set[Path]:
    """The system's libraries that these load, and the loader; what lies in the environment was copied whole."""
    loader = next(path for pattern in ("lib64", "lib") for path in Path("/", pattern).glob("ld-linux*.so*"))
    found = {loader}
    for binary in binaries:
        told = subprocess.run([str(loader), "--list", str(binary)], capture_output=True, text=True, check=False).stdout
        found |= {Path(place) for place in re.findall(r"=> (/\S+) \(", told)}
    return {path for path in found if not path.is_relative_to(ENVIRONMENT)}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
