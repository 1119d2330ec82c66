"""Finds and removes the reasoning that models write before their answer.

Reasoning is recognised by its markup alone:

- a block between two tags, such as `<think>...</think>` or `[THINK]...[/THINK]`, wherever it stands;
- text up to a closing tag that was never opened: chat templates such as DeepSeek's open the block in the prompt;
- an opening tag that is never closed, at the start of a line: the model ran out of tokens, and there is no answer;
- the channels of gpt-oss: all but the last `final` message is reasoning, also where the special tokens were dropped and
  `analysis`, `assistantanalysis` and `assistantfinal` are left, glued to the text around them.

Tags in backticks or in a fenced code block are part of an answer about such tags, and stay.
"""

import re

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
_GLUED_FINAL = re.compile(r"(?<=[.!?)\]}])assistantfinal(?=[A-Z0-9*#\\$])")
"""What is left of gpt-oss's channels where a server dropped the special tokens; the last alone shows that it did."""
_WHOLE_CODE = re.compile(_CODE, _FLAGS)
_HINTS = ("think", "thought", "reasoning", "reflection", "<unused95>", "channel", "analysis", "assistantfinal")


def strip_reasoning(text: str) -> str:
    """The answer without its reasoning and the white space around it; empty where the reasoning never ended."""
    if not _may_hold(text):
        return text.strip()
    if "<|channel|>" in text:
        return _final_message(text)
    answer = _bare_final(text)
    return _without_blocks(text) if answer is None else answer


def has_reasoning(text: str) -> bool:
    """Whether `strip_reasoning` would remove anything but white space."""
    return _may_hold(text) and strip_reasoning(text) != text.strip()


def _may_hold(text: str) -> bool:
    """A cheap look that lets most texts pass without a search."""
    lowered = text.lower()
    return any(hint in lowered for hint in _HINTS)


def _final_message(text: str) -> str:
    """The last message of the channel `final` of gpt-oss's format; empty if there is none."""
    channels = list(_CHANNEL.finditer(text))
    if not channels:
        return text.strip()
    last = channels[-1]
    if last[1].lower() != "final":
        return ""
    return _CHANNEL_END.split(text[last.end() :], maxsplit=1)[0].strip()


def _bare_final(text: str) -> str | None:
    """The last final message where the special tokens of gpt-oss's format were dropped; None where no trace shows it.

    Empty if there is none.
    """
    begins = _BARE_ANALYSIS.match(text)
    if not begins and "assistantanalysis" not in text and "assistantfinal" not in text:
        return None
    prose = _WHOLE_CODE.sub(lambda code: " " * len(code[0]), text)
    if not (begins or _BARE_MIDDLE.search(prose) or _GLUED_FINAL.search(prose)):
        return None
    finals = list(_BARE_FINAL.finditer(prose)) or list(_SPACED_FINAL.finditer(prose))[:1]
    if not finals:
        return ""
    after = _BARE_MIDDLE.search(prose, finals[-1].end())
    return text[finals[-1].end() : after.start() if after else None].strip()


def _without_blocks(text: str) -> str:
    kept: list[str] = []
    start = 0  # of what is not decided on yet
    position = 0
    closings = True  # whether one may follow; looking for it again at every opening would take the square of the length
    while tag := _TAG.search(text, position):
        position = tag.end()
        if tag["close"]:
            # Never opened: everything before it is reasoning.
            kept.clear()
            start = position
        elif tag["open"]:
            # Code does not count within reasoning, which may leave a fence open.
            closing = _CLOSING.search(text, position) if closings else None
            closings = closing is not None
            if closing:
                kept.append(text[start : tag.start()])
                start = position = closing.end()
            elif _starts_line(text, tag.start(), start):
                kept.append(text[start : tag.start()])
                start = position = len(text)
    return _ANSWER_TAGS.sub("", "".join([*kept, text[start:]])).strip()


def _starts_line(text: str, position: int, start: int) -> bool:
    """Whether only white space stands before the position in its line, or since `start`."""
    line = text[start:position].rpartition("\n")[2]
    return not line.strip()
