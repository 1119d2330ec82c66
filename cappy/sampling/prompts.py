"""What a causal LLM is shown for an instruction, as tokens, and how much of a long one fits."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from cappy.errors import ConfigError, shown
from cappy.sampling.chat import chat_prompt


def prompt_tokens(
    tokenizer: Any, instruction: str, *, ends: Collection[int], longest: int | None = None
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
            f"{shown(instruction, 40)}, too few; lower max_new_tokens in a file of decodings, or take another LLM"
        )
    return prompt, True


def rendered(tokenizer: Any, instruction: str, ends: Collection[int]) -> list[int]:
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


def response_tokens(tokenizer: Any, text: str, end: int) -> list[int]:
    """The tokens of a given response and the end token after it."""
    return [*tokenizer(text, add_special_tokens=False).input_ids, end]


def end_tokens(tokenizer: Any, config: Any, folder: Path) -> list[int]:
    """The tokens that end a response, the tokenizer's own first; ConfigError if neither names one."""
    own = getattr(config, "eos_token_id", None)
    known = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    ends = list(dict.fromkeys(end for end in known if end is not None and end < config.vocab_size))
    if not ends:
        raise ConfigError(f"{folder}: neither tokenizer nor config.json names an end token; set eos_token_id there")
    return ends
