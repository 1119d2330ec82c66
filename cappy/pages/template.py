"""Pages of one self-contained file, from a template beside the code that fills it."""

from collections.abc import Mapping
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined, Template


def template(folder: str, filters: Mapping[str, Any]) -> Template:
    """`page.jinja` of a folder of the library, such as "evaluation"; it may include `style.jinja`.

    Every text that it is given is escaped, and a name that it is not given is an error.
    """
    environment = Environment(
        loader=ChoiceLoader([PackageLoader("cappy", folder), PackageLoader("cappy", "pages")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    environment.filters.update(filters)
    return environment.get_template("page.jinja")
