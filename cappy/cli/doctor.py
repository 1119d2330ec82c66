"""`cappy doctor`: checks what this machine needs to run the project, without changing anything."""

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from cappy.cli.flags import TrackingFlag
from cappy.errors import CappyError

_DISTRIBUTION = "cappy-scorer"
_DEMO_EXTRAS = ("pipelines",)
_MIN_FREE_GB = 1.0
_RECOMMENDED_FREE_GB = 5.0
_CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")
"""CPU flags that decide how fast a scorer runs."""
_MARKS = {"ok": "[green]ok[/]", "warning": "[yellow]warning[/]", "failure": "[red]failure[/]"}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The result of one check: a failure prevents the demo from running, a warning does not."""

    name: str
    status: Literal["ok", "warning", "failure"]
    detail: str
    remedy: str = ""


def doctor(
    work: Annotated[Path, typer.Option(help="Folder for work files; its disk is checked.")] = Path(".cappy"),
    tracking_uri: TrackingFlag = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Check packages, processor, GPUs, disk, weights and MLflow; exits with 0 if the demo can run, else 1."""
    findings = _run_checks(work, tracking_uri)
    ok = all(finding.status != "failure" for finding in findings)
    if as_json:
        typer.echo(json.dumps({"ok": ok, "findings": [asdict(finding) for finding in findings]}, indent=1))
    else:
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table

        table = Table(box=None, pad_edge=False, show_header=False)
        for finding in findings:
            text = escape(finding.detail) + (f"\n[bold]→ {escape(finding.remedy)}[/]" if finding.remedy else "")
            table.add_row(escape(finding.name), _MARKS[finding.status], text)
        Console().print(table)
        typer.echo("the demo can run: make demo" if ok else "the demo cannot run yet; fix the failures above")
    if not ok:
        raise typer.Exit(1)


def _run_checks(work: Path, tracking_uri: str = "") -> list[Finding]:
    """Checks what the demo, the services and the trainers need, in the order in which failures should be fixed."""
    return [
        _check_python(),
        *_check_packages(),
        _check_processor(),
        _check_memory(),
        *_check_accelerators(),
        _check_disk(work),
        *_check_builtin(),
        _check_tracking(tracking_uri),
        _check_pickle(),
        _check_user(),
    ]


def _check_python() -> Finding:
    return Finding(name="python", status="ok", detail=f"{platform.python_version()} ({sys.executable})")


def _check_packages() -> Iterator[Finding]:
    """Checks the requirements of the distribution, with one finding per extra."""
    try:
        requirements = importlib.metadata.requires(_DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        yield Finding(
            name="packages", status="failure", detail=f"{_DISTRIBUTION} is not installed", remedy=_pip_command("")
        )
        return
    by_extra: dict[str, list[str]] = {}
    for requirement in requirements:
        name = re.match(r"[\w.-]+", requirement)
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", requirement)
        if name:
            by_extra.setdefault(extra[1] if extra else "", []).append(name[0])
    for extra_name, names in by_extra.items():
        yield _check_extra(extra_name, names)


def _check_extra(extra: str, names: list[str]) -> Finding:
    versions = {name: _version(name) for name in names}
    missing = [name for name, version in versions.items() if version is None]
    title = f"packages [{extra}]" if extra else "packages"
    if not missing:
        detail = ", ".join(f"{name} {version}" for name, version in versions.items())
        return Finding(name=title, status="ok", detail=detail)
    required = not extra or extra in _DEMO_EXTRAS
    status: Literal["failure", "warning"] = "failure" if required else "warning"
    return Finding(name=title, status=status, detail=f"missing: {', '.join(missing)}", remedy=_pip_command(extra))


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _pip_command(extra: str) -> str:
    return f"pip install -e '.[{extra}]'" if extra else "pip install -e ."


def _check_processor() -> Finding:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    text = _read_text(Path("/proc/cpuinfo"))
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = set(" ".join(re.findall(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)[:1]).split())
    flag_names = ", ".join(flag for flag in _CPU_FLAGS if flag in flags) or "no known flags"
    name = model[1] if model else platform.processor() or platform.machine()
    return Finding(name="processor", status="ok", detail=f"{name}, {cores} cores, {flag_names}")


def _check_memory() -> Finding:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _read_text(Path("/sys/fs/cgroup/memory.max")).strip()
    usable = min(total, int(limit)) if limit.isdigit() else total
    detail = f"{usable / 1e9:.1f} GB"
    if usable < 2e9:
        return Finding(name="memory", status="warning", detail=detail, remedy="2 GB or more are recommended")
    return Finding(name="memory", status="ok", detail=detail)


def _check_accelerators() -> Iterator[Finding]:
    if importlib.util.find_spec("torch") is None:
        return
    import torch

    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        detail = f"{properties.name}, {properties.total_memory / 1e9:.0f} GB, CUDA {torch.version.cuda}"
        yield Finding(name=f"gpu {index}", status="ok", detail=detail)
    if not torch.cuda.is_available():
        mps = torch.backends.mps.is_available()
        yield Finding(name="gpu", status="ok", detail="Apple MPS" if mps else "none, using the CPU")


def _check_disk(work: Path) -> Finding:
    folder = next(path for path in (work.absolute(), *work.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(folder).free / 1e9
    detail = f"{free:.1f} GB free at {folder}"
    if not os.access(folder, os.W_OK):
        return Finding(
            name="disk", status="failure", detail=f"{folder} is not writable", remedy="change its permissions"
        )
    if free < _MIN_FREE_GB:
        remedy = f"free {_MIN_FREE_GB:g} GB, or choose another --work"
        return Finding(name="disk", status="failure", detail=detail, remedy=remedy)
    if free < _RECOMMENDED_FREE_GB:
        remedy = f"enough for the demo; {_RECOMMENDED_FREE_GB:g} GB are recommended for your own tasks"
        return Finding(name="disk", status="warning", detail=detail, remedy=remedy)
    return Finding(name="disk", status="ok", detail=detail)


def _check_builtin() -> Iterator[Finding]:
    """Checks that the built-in LLM and scorer are unchanged."""
    remedy = "git checkout -- cappy/builtin/weights"
    for name, check in (("built-in llm", _verify_llm), ("built-in scorer", _verify_scorer)):
        try:
            yield Finding(name=name, status="ok", detail=f"{check()}, sha256 as committed")
        except (CappyError, ImportError) as error:
            yield Finding(name=name, status="failure", detail=str(error), remedy=remedy)


def _verify_llm() -> Path:
    from cappy.builtin import LLM_FOLDER, verify

    verify(LLM_FOLDER)
    return LLM_FOLDER


def _verify_scorer() -> Path:
    from cappy.scorers import scorer_folder

    return scorer_folder("builtin")


def _check_tracking(uri: str) -> Finding:
    """Checks that MLflow's database can be written, or that its server lets this user in; creates no database."""
    from cappy.redaction import redact_address
    from cappy.registry import check_tracking
    from cappy.registry.models import no_database_yet, tracking_address

    address = redact_address(tracking_address(uri))
    try:
        check_tracking(uri)
    except CappyError as error:
        return Finding(name="mlflow", status="failure", detail=str(error))
    if no_database_yet(uri):
        return Finding(name="mlflow", status="ok", detail=f"{address} will be created by the first run")
    return Finding(name="mlflow", status="ok", detail=f"{address} answers")


def _check_pickle() -> Finding:
    """Checks that MLflow refuses pickles, which it loads by default.

    Our client turns that off; other programs need the variable.
    """
    name = "MLFLOW_ALLOW_PICKLE_DESERIALIZATION"
    value = os.environ.get(name, "")
    if value.lower() in ("false", "0"):
        return Finding(name="pickles", status="ok", detail=f"{name} is {value}")
    detail = f"{name} is {value or 'unset'}: cappy refuses pickles, other programs that use MLflow load them"
    return Finding(name="pickles", status="warning", detail=detail, remedy=f"export {name}=false")


def _check_user() -> Finding:
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        return Finding(
            name="user", status="warning", detail="root", remedy="services do not need root; run as another user"
        )
    return Finding(name="user", status="ok", detail="not root")


def _read_text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
