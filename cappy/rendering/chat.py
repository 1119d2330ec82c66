"""A chat template in the child: transformers renders it, the installed version, as `apply_chat_template` has it do.

Importing that takes half a second, once, and no torch.
"""

from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template


def load(source: str) -> tuple[str, None]:
    """The template as it is: transformers compiles it when it is first rendered, and keeps it."""
    return source, None


def prepare(values: dict[str, Any]) -> dict[str, Any]:
    """The messages and the special tokens by name."""
    return values


def render(source: str, values: dict[str, Any], _: Any) -> str:
    """The prompt, up to where the model begins to speak."""
    rendered, _indices = render_jinja_template(
        conversations=[values["messages"]], chat_template=source, add_generation_prompt=True, **values["tokens"]
    )
    return str(rendered[0])
