"""PromptSource templates: read from their YAML files, rendered as PromptSource v0.1.0 and T0 render them, in bounds.

`load_templates` reads those of a dataset, `render` turns a row and a template into an instruction, a target and
choices, `render_rows` many rows under many templates, `fetch` downloads the files.
"""

from cappy.preparation.templates.fetching import fetch
from cappy.preparation.templates.loading import Template, load_templates
from cappy.preparation.templates.rendering import (
    LimitError,
    Rendered,
    Result,
    fields,
    fixed_choices,
    render,
    render_rows,
)

__all__ = [
    "LimitError",
    "Rendered",
    "Result",
    "Template",
    "fetch",
    "fields",
    "fixed_choices",
    "load_templates",
    "render",
    "render_rows",
]
