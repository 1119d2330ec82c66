"""Renders an LLM's chat template, which is untrusted, in a child process."""

import json
from typing import Any

from cappy.errors import FolderError, shown
from cappy.rendering import jobs
from cappy.rendering.jobs import Failure, Job, Source
from cappy.rendering.values import encode

MAX_CHARACTERS = 2**20
"""Of a prompt, beyond the instruction, which the template may repeat `_MAX_REPEATED` times."""
_MAX_REPEATED = 4


def chat_prompt(tokenizer: Any, instruction: str) -> str:
    """What `tokenizer.apply_chat_template` makes of the instruction as the user's turn, up to where the LLM begins.

    FolderError names the tokenizer's folder where the template fails, takes too long or too much memory.
    """
    turns = [{"role": "user", "content": instruction}]
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:  # several templates, and none is the default
        raise _unusable(tokenizer, shown(str(error).partition(".")[0], limit=120)) from error
    values = json.dumps(encode({"messages": turns, "tokens": dict(tokenizer.special_tokens_map)}), ensure_ascii=False)
    job = Job(values=values, items=((Source("chat", (template,)), None),))
    ((outcome,),) = jobs.run("chat", [job])
    if isinstance(outcome, Failure):
        raise _unusable(tokenizer, outcome.reason)
    if not isinstance(outcome, str):
        raise TypeError(f"the child answers {shown(outcome)}")
    if len(outcome) > MAX_CHARACTERS + len(instruction) * _MAX_REPEATED:
        raise _unusable(tokenizer, f"makes {len(outcome):,} characters of {len(instruction):,}")
    return outcome


def _unusable(tokenizer: Any, reason: str) -> FolderError:
    remedy = "mend the template in the folder, or take another LLM"
    return FolderError(f"{tokenizer.name_or_path}: its chat template cannot be used ({reason}); {remedy}")
