"""The surface of `cappy`: its verbs, what they say of themselves, and how they end."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from wording import assert_names

import cappy.cli
from cappy.cli import CommandGroup
from cappy.errors import FolderError
from cappy.steps import STEP_SPECS
from cappy.worker import config_class

Cappy = Callable[..., subprocess.CompletedProcess[str]]
Rows = Callable[[str], dict[str, str]]

OTHER = "explain clean adapt score select serve gateway plan convert templates threshold doctor pipeline"
VERBS = {*STEP_SPECS, *OTHER.split()}
OWN = {
    "preparation": "--plan",
    "sampling": "--estimate",
    "annotation": "--data-report",
    "promotion": "--dry-run --rollback --history --name --reason",
}
"""The flags of a step's verb that are not settings."""
HEAVY = "torch transformers mlflow kfp numpy pyarrow fastapi serving.app serving.engine pipelines components".split()


def listed(text: str) -> dict[str, str]:
    """The rows of a help page under Commands."""
    rows = text.split("Commands:\n")[1].splitlines()
    return dict(row.split(maxsplit=1) for row in rows)


def test_the_verbs_are_these_and_each_says_what_it_does_in_one_row(cappy: Cappy) -> None:
    rows = listed(cappy("--help").stdout)
    assert set(rows) == VERBS
    assert not [row for row in rows.values() if row.endswith("...")]


def test_help_and_version_import_nothing_heavy() -> None:
    program = (
        "import sys\nfrom cappy.cli import main\ntry:\n    main(sys.argv[1:])\nexcept SystemExit as ended:\n"
        f"    found = [name for name in {HEAVY} if name in sys.modules]\n"
        "    sys.exit(f'{ended.code} {found}' if found or ended.code else 0)\n"
    )
    for words in (
        ["--help"],
        ["--version"],
        ["score", "--help"],
        ["serve", "--help"],
        ["gateway", "--help"],
        ["adapt", "--help"],
        ["threshold", "--help"],
        ["plan", "--help"],
    ):
        done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), words


def test_version_prints_the_version(cappy: Cappy) -> None:
    assert cappy("--version").stdout == "cappy 0.1.0\n"


@pytest.mark.parametrize("verb", sorted(VERBS - {"pipeline"}))
def test_help_of_a_verb_explains_every_flag_with_its_default(verb: str, here: Cappy, flag_rows: Rows) -> None:
    done = here(verb, "--help")
    assert done.returncode == 0
    rows = flag_rows(done.stdout)
    assert set(rows) > {"--help"}
    for flag, text in rows.items():
        if flag not in ("--help", "--help-all", "--json", "--fresh"):
            assert re.search(r"\[default: |\[required\]|\bdefault\b|\bleft out\b", text, re.IGNORECASE), flag
            explained = re.sub(r"^\S* *(<[^>]*>)?|\[(default|required).*", "", text).strip()
            assert len(explained) > 8, (flag, text)


@pytest.mark.parametrize("step", STEP_SPECS)
def test_a_step_has_one_flag_per_field_of_its_config(step: str, here: Cappy, flag_rows: Rows) -> None:
    config: Any = config_class(step)
    fields = config.__pydantic_fields__
    shown, done = set(flag_rows(here(step, "--help").stdout)), here(step, "--help-all")
    assert done.returncode == 0
    rows = flag_rows(done.stdout)
    assert shown - {"--help-all"} <= set(rows)
    assert ("--help-all" in shown) == (shown - {"--help-all"} < set(rows))
    own = set(OWN.get(step, "").split())
    assert set(rows) == {f"--{name.replace('_', '-')}" for name in fields} | {"--json", "--help"} | own


def test_an_unknown_verb_and_no_verb_are_wrong_usage(here: Cappy) -> None:
    unknown = here("anotation")
    assert unknown.returncode == 2
    assert "'annotation'" in unknown.stderr
    assert here().returncode == 2


def test_what_a_person_can_mend_is_one_line_and_status_1(cappy: Cappy) -> None:
    done = cappy("annotation", "--source", "absent", "--target", "out")
    assert done.returncode == 1
    assert done.stderr.startswith("cappy annotation: absent: ")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def ending(*words: str) -> int:
    """The status of a command line whose verbs end in the ways that verbs can."""
    small = typer.Typer(cls=CommandGroup, pretty_exceptions_enable=False)

    @small.command()
    def mendable() -> None:
        raise FolderError("mendable: here:\n  is damaged; write it again")

    @small.command()
    def stopped() -> None:
        raise KeyboardInterrupt

    @small.command()
    def broken() -> None:
        raise ZeroDivisionError("a defect")

    with pytest.raises(SystemExit) as ended:
        small(list(words), prog_name="cappy")
    return int(ended.value.code or 0)


def test_an_error_of_several_lines_becomes_one_that_names_the_verb_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert ending("mendable") == 1
    assert capsys.readouterr().err == "cappy mendable: here: is damaged; write it again\n"


def test_ctrl_c_is_one_line_and_status_130(capsys: pytest.CaptureFixture[str]) -> None:
    assert ending("stopped") == 130
    assert capsys.readouterr().err == "cappy stopped: interrupted\n"


def test_a_defect_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        ending("broken")


def test_doctor_looks_at_everything_and_its_status_says_whether_the_demo_can_run(cappy: Cappy, here: Cappy) -> None:
    done = cappy("doctor", "--json")
    report = json.loads(done.stdout)
    statuses = {finding["name"]: finding["status"] for finding in report["findings"]}
    assert {
        "python",
        "packages",
        "processor",
        "memory",
        "disk",
        "built-in llm",
        "built-in scorer",
        "mlflow",
        "user",
    } < set(statuses)
    assert report["ok"] == ("failure" not in statuses.values())
    assert done.returncode == (0 if report["ok"] else 1)
    assert here("doctor").returncode == done.returncode


def test_the_module_offers_its_entry_point_alone() -> None:
    assert cappy.cli.__all__ == ["main"]


def test_a_plan_is_printed_without_a_target_and_loads_nothing(here: Cappy) -> None:
    done = here("preparation", "--mixture", "t0", "--plan")
    assert (done.returncode, done.stderr) == (0, "")
    assert "17,277,798" in done.stdout
    assert "wiki_hop/original" in done.stdout
    totals = json.loads(here("preparation", "--mixture", "t0", "--plan", "--json").stdout)["totals"]
    assert (totals["examples"], round(totals["pairs"] / 1e6, 1)) == (17_277_798, 151.8)
    part = json.loads(here("preparation", "--mixture", "t0", "--subsets", "glue/*", "--plan", "--json").stdout)
    assert [subset["name"] for subset in part["subsets"]] == ["glue/mrpc", "glue/qqp"]
    assert "17,277,798" not in here("preparation", "--mixture", "t0", "--subsets", "wiki_hop/*", "--plan").stdout
    alone = here("preparation", "--plan")
    assert_names(alone.stderr, "cappy preparation: --plan", "--mixture t0, heldout or bigbench45")
    without = here("preparation", "--mixture", "t0")
    assert without.returncode == 2
    assert "--target FOLDER" in without.stderr


def test_a_report_lies_beside_the_labels_and_its_tables_are_printed(here: Cappy, tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    rows = [{"instruction": f"Say {n}.", "reference": f"number {n}", "responses": [f"{n}", "no"]} for n in range(20)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert here("preparation", "--source", source, "--target", "instances").returncode == 0
    done = here("annotation", "--source", "instances", "--target", "labels", "--data-report")
    assert_names(done.stdout, "selectable", "oracle", "33.3")
    assert done.stdout.rstrip().endswith("labels/report/report.html")
    again = here("annotation", "--source", "instances", "--target", "labels", "--data-report", "--json")
    assert json.loads(again.stdout)["step"] == "annotation"


def test_a_process_that_ends_does_not_search_what_it_loaded_for_garbage() -> None:
    """Functions that are registered first run last."""
    program = (
        "import atexit, gc\n"
        "atexit.register(lambda: print(gc.get_freeze_count() > 1000, gc.get_threshold()[0] > 1000))\n"
        "from cappy.cli import main\n"
        "main(['--version'])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-2:] == ["True", "True"]


def test_a_service_frees_what_it_refused_as_soon_as_any_program() -> None:
    program = (
        "import gc\n"
        "before = gc.get_threshold()\n"
        "from cappy.runs import tune_garbage_collector\n"
        "from serving.listener import prepare_process\n"
        "tune_garbage_collector()\n"
        "prepare_process()\n"
        "print(gc.get_threshold() == before)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True"]
