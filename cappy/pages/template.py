"""Pages of one self-contained file, from a template beside the code that fills it.

Each says in its head what a browser may do with it: run and apply the scripts and styles of the template, show pictures
that it holds, and nothing else. A text of the data that came to be an element all the same would load and run nothing.
"""

import base64
import hashlib
from collections.abc import Mapping
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined, Template

_NONE = "'none'"
_BLOCKS = {"script": "script-src", "style": "style-src-elem"}
"""The blocks of a template whose text is hashed, and the directive that names the hash."""


def render(folder: str, filters: Mapping[str, Any], **values: Any) -> str:
    """The page that `page.jinja` of a folder of the library, such as "evaluation", makes of the values.

    It may include `style.jinja`, and has its scripts and styles in blocks of these names, which are given no value.
    Every text is escaped, and a name that is not given is an error.
    """
    page = _template(folder, filters)
    return page.render(values, policy=content_security_policy(page))


def content_security_policy(page: Template) -> str:
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


def _template(folder: str, filters: Mapping[str, Any]) -> Template:
    environment = Environment(
        loader=ChoiceLoader([PackageLoader("cappy", folder), PackageLoader("cappy", "pages")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    environment.filters.update(filters)
    return environment.get_template("page.jinja")
