"""What a causal LLM is shown for an instruction: its chat template, which is untrusted, and how much of it fits."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from cappy.errors import ConfigError, FolderError, shown
from cappy.rendering import jobs
from cappy.rendering.jobs import Failure, Job, Source
from cappy.rendering.values import encode

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase


def prompt_tokens(
    tokenizer: "PreTrainedTokenizerBase", instruction: str, *, ends: Collection[int], longest: int | None = None
) -> tuple[list[int], bool]:
    """The prompt's tokens, at most `longest`, and whether the instruction lost its end for that.

    The prompt is the tokenizer's chat template with the instruction as the user's turn, or the instruction alone where
    there is no template. The template itself is never cut; ConfigError if there is no room for anything else.
    """
    prompt = rendered(tokenizer, instruction, ends)
    if longest is None or len(prompt) <= longest:
        return prompt, False
    own: list[int] = tokenizer(instruction, add_special_tokens=False).input_ids
    while len(prompt) > longest and own:
        own = own[: max(0, len(own) - (len(prompt) - longest))]
        prompt = rendered(tokenizer, tokenizer.decode(own), ends)
    if not own or len(prompt) > longest:
        raise ConfigError(
            f"sampling: the LLM's context leaves {max(longest, 0)} tokens for the instruction "
            f"{shown(instruction, 40)}, too few; lower --max-new-tokens (or max_new_tokens in the file of decodings), "
            "or take another LLM"
        )
    return prompt, True


def rendered(tokenizer: "PreTrainedTokenizerBase", instruction: str, ends: Collection[int]) -> list[int]:
    """The tokens of the whole prompt."""
    if tokenizer.chat_template:
        text = chat_prompt(tokenizer, instruction)
        ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
        return ids
    ids = tokenizer(instruction).input_ids
    # Some tokenizers close every text; after an end token there would be nothing to say.
    while ids and ids[-1] in ends:
        ids = ids[:-1]
    return ids or [next(iter(ends)) if tokenizer.bos_token_id is None else tokenizer.bos_token_id]


def response_tokens(tokenizer: "PreTrainedTokenizerBase", text: str, end: int) -> list[int]:
    """The tokens of a given response and the end token after it."""
    return [*tokenizer(text, add_special_tokens=False).input_ids, end]


def end_tokens(tokenizer: "PreTrainedTokenizerBase", config: "PreTrainedConfig", folder: Path) -> list[int]:
    """The tokens that end a response, the tokenizer's own first; ConfigError if none is named.

    Beside it those of config.json and, where the tokenizer has them as added tokens, of generation_config.json: some
    chat LLMs name the end of their turn there alone. A word of the vocabulary is a setting of the folder, not an end.
    """
    turns = [end for end in _listed(_generation_ends(folder)) if end in tokenizer.added_tokens_decoder]
    known = [tokenizer.eos_token_id, *_listed(getattr(config, "eos_token_id", None)), *turns]
    ends = list(dict.fromkeys(end for end in known if end is not None and end < config.vocab_size))
    if not ends:
        raise ConfigError(f"{folder}: neither tokenizer nor config.json names an end token; set eos_token_id there")
    return ends


def _generation_ends(folder: Path) -> object:
    """`eos_token_id` of the folder's generation_config.json, checked when the folder was opened; None without one."""
    path = folder / "generation_config.json"
    values = json.loads(path.read_bytes()) if path.is_file() else None
    return values.get("eos_token_id") if isinstance(values, dict) else None


def _listed(ends: object) -> list[int]:
    listed = ends if isinstance(ends, list) else [ends]
    return [end for end in listed if isinstance(end, int) and not isinstance(end, bool) and end >= 0]


MAX_CHARACTERS = 2**20
"""Of a prompt, beyond the instruction, which the template may repeat `_MAX_REPEATED` times."""
_MAX_REPEATED = 4


def chat_prompt(tokenizer: "PreTrainedTokenizerBase", instruction: str) -> str:
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


def _unusable(tokenizer: "PreTrainedTokenizerBase", reason: str) -> FolderError:
    remedy = "mend the template in the folder, or take another LLM"
    return FolderError(f"{tokenizer.name_or_path}: its chat template cannot be used ({reason}); {remedy}")
