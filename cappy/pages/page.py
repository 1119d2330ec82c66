"""Renders self-contained HTML pages from templates, and draws plots in a common style.

Each page has a content security policy: only the scripts and styles of the template and embedded images are allowed.
Even if text from the data became an element, it could not load or run anything.
"""

import base64
import contextlib
import hashlib
import io
import re
from collections.abc import Callable, Iterator, Mapping

import matplotlib as mpl
from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined, Template
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, QUIET, GRID = "#1b1f24", "#5b6470", "#d9dde3"
VARIABLES: Mapping[str, str] = {INK: "var(--ink)", QUIET: "var(--quiet)", GRID: "var(--line)"}

_STYLE = re.compile(r"\s*<style\b[^>]*>[^<]*</style>")
"""matplotlib's style element, which the page's policy would block; `style.jinja` contains its only rule."""
_NONE = "'none'"
_BLOCKS = {"script": "script-src", "style": "style-src-elem"}
"""The blocks of a template whose text is hashed, with the directive for each hash."""


def render_template(template: str, filters: Mapping[str, Callable[..., object]], **values: object) -> str:
    """Renders a template of the `cappy` package, such as "evaluation/page.jinja", with these values.

    The template may include `style.jinja`. Its scripts and styles must be in the blocks `script` and `style`, which
    cannot use the values. All text is escaped, and an undefined name is an error.
    """
    page = _template(template, filters)
    return page.render(values, policy=_content_security_policy(page))


def _content_security_policy(page: Template) -> str:
    """The policy of a page, with hashes of the template's scripts and styles.

    style attributes are allowed, because bars and plots use them for widths and colours. Browsers without
    style-src-elem use style-src.
    """
    allowed: dict[str, list[str]] = {directive: [] for directive in _BLOCKS.values()}
    for name, directive in _BLOCKS.items():
        if name in page.blocks:
            allowed[directive].append("".join(page.blocks[name](page.new_context({}))))
    return "; ".join(
        [
            "default-src 'none'",
            *(f"{directive} {' '.join(map(_hash, texts)) or _NONE}" for directive, texts in allowed.items()),
            "style-src-attr 'unsafe-inline'",
            "style-src 'unsafe-inline'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _template(path: str, filters: Mapping[str, Callable[..., object]]) -> Template:
    folder, _, name = path.rpartition("/")
    environment = Environment(
        loader=ChoiceLoader([PackageLoader("cappy", folder), PackageLoader("cappy", "pages")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    environment.filters.update(filters)
    return environment.get_template(name)


@contextlib.contextmanager
def draw_figure(width: float, height: float) -> Iterator[Figure]:
    """An empty transparent figure, `width` by `height` inches, to draw on inside the block."""
    with mpl.rc_context({"font.family": "DejaVu Sans", "font.size": 9.5, "text.color": INK}):
        figure = Figure(figsize=(width, height), layout="constrained")
        figure.set_facecolor("none")
        yield figure


def plain_axes(figure: Figure, x: str, y: str, position: tuple[int, int, int] = (1, 1, 1)) -> Axes:
    """Axes with labels and a grid but no frame; `position` is (rows, columns, index) of the subplot."""
    axes = figure.add_subplot(*position)
    axes.set_facecolor("none")
    axes.set_xlabel(x, color=QUIET)
    axes.set_ylabel(y, color=QUIET)
    axes.grid(visible=True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=QUIET, length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return axes


def to_svg(figure: Figure, *, salt: str, variables: Mapping[str, str]) -> str:
    """The figure as a deterministic SVG element; `variables` maps colours to CSS variables of the page.

    `salt` makes its ids differ from those of other plots on the page.
    """
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    for colour, variable in {**VARIABLES, **variables}.items():
        text = text.replace(colour, variable)
    return _STYLE.sub("", text[text.index("<svg") :])


def to_svg_file(figure: Figure, *, salt: str) -> bytes:
    """The figure as a deterministic SVG file with a white background."""
    figure.set_facecolor("white")
    buffer = io.BytesIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def to_png(figure: Figure) -> bytes:
    """The figure as PNG with a white background."""
    figure.set_facecolor("white")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160, metadata={"Software": None})
    return buffer.getvalue()
