"""Finds and removes the reasoning that models write before their answer.

Reasoning is recognised by its markup alone:

- a block between two tags, such as `<think>...</think>` or `[THINK]...[/THINK]`, anywhere in the text;
- text up to a closing tag without an opening one: chat templates such as DeepSeek's open the block in the prompt;
- an opening tag at the start of a line without a closing one: the model ran out of tokens before it answered;
- the channels of gpt-oss: everything but the last `final` message is reasoning. Where a server dropped the special
  tokens, `analysis`, `assistantanalysis` and `assistantfinal` remain, joined to the text around them.

Tags in backticks or in a fenced code block belong to an answer about such tags and are kept.
"""

import re
from dataclasses import replace

from cappy.records import Candidate

_NAMES = r"(?:\w+:|ant)?(?:think|thinking|thoughts?|reasoning|reflection)"
_PAIRS = (
    (rf"<{_NAMES}(?:\s[^<>]*)?>", rf"</{_NAMES}\s*>"),
    (r"\[THINK(?:ING)?\]", r"\[/THINK(?:ING)?\]"),
    (r"◁think▷", r"◁/think▷"),
    (r"<\|begin_of_thought\|>", r"<\|end_of_thought\|>"),
    (r"<\|START_THINKING\|>", r"<\|END_THINKING\|>"),
    (r"<unused94>", r"<unused95>"),  # MedGemma
    (r"<\|channel>\s*thought\b", r"<channel\|>"),  # Gemma 4
)
_OPEN = "|".join(start for start, _ in _PAIRS)
_CLOSE = "|".join(end for _, end in _PAIRS)
_CODE = r"^[ \t]*```.*?^[ \t]*```|`[^`\n]+`"
_FLAGS = re.IGNORECASE | re.DOTALL | re.MULTILINE
_TAG = re.compile(rf"(?P<code>{_CODE})|(?P<open>{_OPEN})|(?P<close>{_CLOSE})", _FLAGS)
_CLOSING = re.compile(_CLOSE, _FLAGS)
_ANSWER_TAGS = re.compile(r"<\|(?:begin|end)_of_solution\|>|<\|(?:START|END)_RESPONSE\|>")
_CHANNEL = re.compile(
    r"(?:<\|start\|>\s*assistant[^<]*)?<\|channel\|>\s*(\w+)[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>"
)
_CHANNEL_END = re.compile(r"<\|(?:end|return|call|start)\|>")
_BARE_ANALYSIS = re.compile(r"\A\s*analysis(?=[A-Z])")
_BARE_MIDDLE = re.compile(r"(?<![`'\"“‘_-])assistantanalysis(?=[A-Z\"\n])")
_BARE_FINAL = re.compile(r"(?<![`'\"“‘_-])assistantfinal(?![a-z`'_])")
_SPACED_FINAL = re.compile(r"assistant\sfinal(?![a-z])")
_JOINED_FINAL = re.compile(r"(?<=[.!?)\]}])assistantfinal(?=[A-Z0-9*#\\$])")
"""gpt-oss channel names without their special tokens; `_JOINED_FINAL` alone is enough to recognise that format."""
_WHOLE_CODE = re.compile(_CODE, _FLAGS)
_HINTS = ("think", "thought", "reasoning", "reflection", "<unused95>", "channel", "analysis", "assistantfinal")


def strip_reasoning(text: str) -> str:
    """The answer without reasoning and surrounding white space; empty if the reasoning never ended."""
    if not _may_contain_reasoning(text):
        return text.strip()
    if "<|channel|>" in text:
        return _final_message(text)
    answer = _bare_final(text)
    return _remove_blocks(text) if answer is None else answer


def has_reasoning(text: str) -> bool:
    """Whether `strip_reasoning` would remove anything but white space."""
    return _may_contain_reasoning(text) and strip_reasoning(text) != text.strip()


class ReasoningFilter:
    """Counts the candidates that contain reasoning, and removes it if `strip` is set."""

    def __init__(self, *, strip: bool) -> None:
        self._strip = strip
        self._count = 0

    def __call__(self, candidate: Candidate) -> Candidate:
        """The candidate; with `strip` without its reasoning and likelihood (status `empty` if nothing is left)."""
        if not has_reasoning(candidate.response):
            return candidate
        self._count += 1
        if not self._strip:
            return candidate
        response = strip_reasoning(candidate.response)
        status = candidate.status if response or not candidate.selectable else "empty"
        return replace(
            candidate, response=response, status=status, logprob_sum=None, logprob_mean=None, num_tokens=None
        )

    def take_count(self) -> int:
        """Returns the number of candidates with reasoning since the last call, and resets it."""
        count, self._count = self._count, 0
        return count


def _may_contain_reasoning(text: str) -> bool:
    """A cheap test that rules out most texts without a regular expression."""
    lowered = text.lower()
    return any(hint in lowered for hint in _HINTS)


def _final_message(text: str) -> str:
    """The last message in the channel `final` of gpt-oss's format; empty if there is none."""
    channels = list(_CHANNEL.finditer(text))
    if not channels:
        return text.strip()
    last = channels[-1]
    if last[1].lower() != "final":
        return ""
    return _CHANNEL_END.split(text[last.end() :], maxsplit=1)[0].strip()


def _bare_final(text: str) -> str | None:
    """The last `final` message of gpt-oss's format without special tokens, empty if there is none.

    None if the text is not in that format.
    """
    starts_with_analysis = _BARE_ANALYSIS.match(text)
    if not starts_with_analysis and "assistantanalysis" not in text and "assistantfinal" not in text:
        return None
    prose = _WHOLE_CODE.sub(lambda code: " " * len(code[0]), text)
    if not (starts_with_analysis or _BARE_MIDDLE.search(prose) or _JOINED_FINAL.search(prose)):
        return None
    finals = list(_BARE_FINAL.finditer(prose)) or list(_SPACED_FINAL.finditer(prose))[:1]
    if not finals:
        return ""
    after = _BARE_MIDDLE.search(prose, finals[-1].end())
    return text[finals[-1].end() : after.start() if after else None].strip()


def _remove_blocks(text: str) -> str:
    answer_parts: list[str] = []
    start = 0  # start of the text that is not classified yet
    position = 0
    may_close = True  # whether a closing tag may follow; searching again at every opening would take quadratic time
    while tag := _TAG.search(text, position):
        position = tag.end()
        if tag["close"]:
            # Without an opening tag, everything before it is reasoning.
            answer_parts.clear()
            start = position
        elif tag["open"]:
            # Code fences inside reasoning are ignored: they may be left open.
            closing = _CLOSING.search(text, position) if may_close else None
            may_close = closing is not None
            if closing:
                answer_parts.append(text[start : tag.start()])
                start = position = closing.end()
            elif _starts_line(text, tag.start(), start):
                answer_parts.append(text[start : tag.start()])
                start = position = len(text)
    return _ANSWER_TAGS.sub("", "".join([*answer_parts, text[start:]])).strip()


def _starts_line(text: str, position: int, start: int) -> bool:
    """Whether there is only white space before the position in its line, or since `start`."""
    line = text[start:position].rpartition("\n")[2]
    return not line.strip()
