"""The pages of docs/: they build, load nothing from elsewhere, say what the code says, and their blocks run."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import chat_server
import pytest
import yaml
from chromium import launched, needs_chromium
from documents import PAGES, ROOT, RUNS, Block, blocks

from cappy.sampling.step import SamplingConfig
from pipelines.recipe import check_recipe

README_RUNS_IT = "the README runs it"
BLOCKS = [block for page in PAGES for block in blocks(page)]
NAMED_FILE = re.compile(r"\b(?:tests|benchmarks|cappy|serving|pipelines|components|docs)/[\w/.-]*\w(?:/|\b)")
UNREACHABLE = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; a machine without a network builds it too."""
    folder = tmp_path_factory.mktemp("site")
    offline = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), UNREACHABLE)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **offline}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


class Assets(HTMLParser):
    """What a page makes a browser fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        actual = dict(attrs)
        address = actual.get("href") if tag == "link" else actual.get("src")
        self.names += [address] if address and tag != "a" else []


def test_the_pages_build_strictly_and_load_nothing_from_elsewhere(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 25
    for page in pages:
        assets = Assets()
        assets.feed(page.read_text(encoding="utf-8"))
        assert assets.names
        assert not [address for address in assets.names if re.match(r"(https?:)?//", address)], page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import )['\"]?(https?:)?//", sheet.read_text(encoding="utf-8")), sheet
    assert not list(site.rglob("*.py"))


@needs_chromium
def test_pages_fit_a_phone_and_a_desk_and_the_picture_is_in_the_page(site: Path) -> None:
    with launched() as browser:
        for width in (390, 1280):
            page = browser.new_page(viewport={"width": width, "height": 900})
            asked: list[str] = []
            page.on("request", lambda request, asked=asked: asked.append(request.url))
            for name in ("index", "concepts", "guides/vertex", "troubleshooting", "reference/cli"):
                page.goto((site / f"{name}.html").as_uri())
                assert page.evaluate("document.documentElement.scrollWidth") <= width, (name, width)
            assert not [url for url in asked if not url.startswith(("file:", "data:", "blob:"))]
            page.goto((site / "concepts.html").as_uri())
            drawing = page.locator("svg.flow")
            assert drawing.bounding_box()["width"] > 300
            colours = set()
            for scheme in ("default", "slate"):
                page.evaluate(f"document.body.setAttribute('data-md-color-scheme', '{scheme}')")
                colours.add(page.evaluate("getComputedStyle(document.querySelector('.flow .name')).fill"))
            assert len(colours) == 2, "the picture follows the page's switch"


def test_the_reference_is_what_the_code_says() -> None:
    command = [sys.executable, str(ROOT / "docs" / "reference.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_page_is_in_the_navigation() -> None:
    actual = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = {str(page.relative_to(ROOT / "docs")) for page in PAGES[1:]}
    assert pages == set(re.findall(r"^ +- (?:[\w ]+: )?([\w/.-]+\.md)$", actual, re.MULTILINE))


def test_a_block_runs_or_says_why_it_does_not() -> None:
    assert len(BLOCKS) > 40
    for block in BLOCKS:
        assert block.reason or block.language in RUNS, f"{block.place}: {block.language!r} does not run; say why"
    readme = {block.code for block in blocks(PAGES[0]) if not block.reason}
    shared = [block for block in BLOCKS if block.reason == README_RUNS_IT]
    assert shared
    for block in shared:
        assert block.code in readme, f"{block.place}: the README has no such block"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_are_there(page: Path) -> None:
    for name in NAMED_FILE.findall(page.read_text(encoding="utf-8")):
        if "*" not in name and name.endswith((".py", ".md", ".json", "/")):
            assert (ROOT / name).exists(), name


def test_errors_that_troubleshooting_quotes_are_the_code_s_own() -> None:
    lines = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8").splitlines()
    entries = [result[1] for line in lines if (result := re.match(r"- `(.+?)`: ", line))]
    quoted = [quote for entry in entries for quote in entry.split("`, `")]
    assert len(quoted) > 40
    texts = list(said())
    for quote in quoted:
        parts = [part.strip() for part in quote.split("...")]
        assert any(all(part in text for part in parts) for text in texts), quote


def said() -> Iterator[str]:
    """Every text of the code and of the Makefile, what is filled into it left out."""
    for package in ("cappy", "serving", "pipelines"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = [part.value if isinstance(part, ast.Constant) else " … " for part in node.values]
                    yield "".join(map(str, parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value
    yield (ROOT / "Makefile").read_text(encoding="utf-8")


def test_files_that_pages_show_are_read(tmp_path: Path) -> None:
    """Recipes and decodings in YAML, which no command line of their page reads."""
    recipes = [block for block in BLOCKS if block.reason.startswith("a part of a recipe")]
    decodings = [block for block in BLOCKS if block.reason.startswith("a file of decodings")]
    assert recipes
    assert decodings
    for block in recipes:
        assert check_recipe({"pipeline": "adapt", **yaml.safe_load(block.code)}).resources
    for block in decodings:
        file = tmp_path / "decodings.yaml"
        file.write_text(block.code, encoding="utf-8")
        config = SamplingConfig(source=tmp_path, target=tmp_path / "out", strategy=str(file))
        assert len(config.decodings) == len(yaml.safe_load(block.code))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all pages' blocks run, with the README's example in it."""
    place = tmp_path_factory.mktemp("pages")
    run(next(block for block in blocks(PAGES[0]) if "tasks.jsonl" in block.code), place)
    assert (place / "tasks.jsonl").is_file()
    return place


def run(block: Block, folder: Path, **environment: str) -> None:
    """Runs a block and asserts that it ends well."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = [*RUNS[block.language], block.code]
    actual = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, cwd=folder, env=actual, capture_output=True, text=True)
    assert done.returncode == 0, f"{block.place}\n{block.code}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


RUNNING = [page for page in PAGES[1:] if any(not block.reason for block in blocks(page))]


@pytest.mark.parametrize("page", RUNNING, ids=lambda page: page.stem)
def test_blocks_of_a_page_run(page: Path, folder: Path) -> None:
    """The README's blocks have a test of their own; LLM_URL, which a page has the reader set, is a server of ours."""
    with chat_server.serving(chat_server.Model()) as url:
        for block in blocks(page):
            if not block.reason:
                run(block, folder, LLM_URL=url, OPENAI_API_KEY="sk-of-the-tests")
