"""Pages of one self-contained file, from a template beside the code that fills it, and plots with one look.

Each page says in its head what a browser may do with it: run and apply the scripts and styles of the template, show
pictures that it holds, and nothing else. A text of the data that came to be an element all the same would load and run
nothing.
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
"""A rule of matplotlib's for all lines. `style.jinja` has it, for a page applies no style but its template's."""
_NONE = "'none'"
_BLOCKS = {"script": "script-src", "style": "style-src-elem"}
"""The blocks of a template whose text is hashed, and the directive that names the hash."""


def render_template(template: str, filters: Mapping[str, Callable[..., object]], **values: object) -> str:
    """The page that a template of the library, such as "evaluation/page.jinja", makes of the values.

    It may include `style.jinja`, and has its scripts and styles in blocks of these names, which are given no value.
    Every text is escaped, and a name that is not given is an error.
    """
    page = _template(template, filters)
    return page.render(values, policy=_content_security_policy(page))


def _content_security_policy(page: Template) -> str:
    """What a browser may do with the page, by the hashes of the template's own scripts and styles.

    Attributes named style are allowed: bars and plots have widths and colours of their own there. Browsers that know no
    style-src-elem take style-src.
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
    """A clear figure, `width` by `height` inches, to draw on inside the block."""
    with mpl.rc_context({"font.family": "DejaVu Sans", "font.size": 9.5, "text.color": INK}):
        figure = Figure(figsize=(width, height), layout="constrained")
        figure.set_facecolor("none")
        yield figure


def plain_axes(figure: Figure, x: str, y: str, place: tuple[int, int, int] = (1, 1, 1)) -> Axes:
    """Axes with a grid, without a frame, with what each direction measures; `place` is rows, columns and index."""
    axes = figure.add_subplot(*place)
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
    """The figure as an SVG element: equal figures give equal text, and `variables` maps colours to the page's.

    `salt` keeps the names inside it apart from those of other plots of the page.
    """
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    for colour, variable in {**VARIABLES, **variables}.items():
        text = text.replace(colour, variable)
    return _STYLE.sub("", text[text.index("<svg") :])


def to_svg_file(figure: Figure, *, salt: str) -> bytes:
    """The figure on white as a file of its own, in its own colours; equal figures give equal bytes."""
    figure.set_facecolor("white")
    buffer = io.BytesIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def to_png(figure: Figure) -> bytes:
    """The figure on white, for places that show pictures only."""
    figure.set_facecolor("white")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160, metadata={"Software": None})
    return buffer.getvalue()
