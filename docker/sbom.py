"""Adds Python and Debian's packages to a bill of materials of Python packages: python3 sbom.py IN OUT [ROOT].

With ROOT, it adds only those Debian packages that have a file under it.
"""

import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

DPKG_INFO = Path("/var/lib/dpkg/info")
DISTRIBUTION = "debian"


def main(source: Path, target: Path, root: Path) -> None:
    """Reads a CycloneDX file in JSON and writes it with the added components."""
    bill = json.loads(source.read_text())
    bill["components"] = [*bill.get("components", []), interpreter(), *debian_packages(root)]
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(bill, indent=1) + "\n")


def interpreter() -> dict[str, Any]:
    """CPython as a CycloneDX component."""
    version = platform.python_version()
    return {"type": "application", "name": "cpython", "version": version, "bom-ref": f"pkg:generic/cpython@{version}"}


def debian_packages(root: Path) -> list[dict[str, Any]]:
    """The installed packages that have a file under `root`."""
    form = "${Package}\t${Version}\t${Architecture}\n"
    result = subprocess.run(["dpkg-query", "--show", "--showformat", form], capture_output=True, text=True, check=True)
    rows = (line.split("\t") for line in result.stdout.splitlines())
    return [component(*row) for row in rows if root == Path("/") or has_file_under(row[0], row[2], root)]


def has_file_under(name: str, architecture: str, root: Path) -> bool:
    """Whether a file of the package lies under `root`."""
    lists = [path for path in (DPKG_INFO / f"{name}.list", DPKG_INFO / f"{name}:{architecture}.list") if path.exists()]
    files = (line for path in lists for line in path.read_text().splitlines())
    return any((root / file.lstrip("/")).is_file() for file in files)


def component(name: str, version: str, architecture: str) -> dict[str, Any]:
    """A Debian package as a CycloneDX component."""
    purl = f"pkg:deb/{DISTRIBUTION}/{name}@{version}?arch={architecture}"
    return {"type": "library", "name": name, "version": version, "purl": purl, "bom-ref": purl}


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3] if len(sys.argv) > 3 else "/"))
