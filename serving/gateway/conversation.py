"""The instruction that is scored: a conversation as one text.

One user's turn alone is its content as it is, which is what scorers are trained on. Else every turn becomes
`Role: content`, one blank line between turns, in their order; `developer` is System, OpenAI's newer word for it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from serving.gateway.errors import GatewayError

_ROLES = {"system": "System", "developer": "System", "user": "User", "assistant": "Assistant"}


def instruction_of(messages: Sequence[Mapping[str, Any]]) -> str:
    """The text that candidates are scored against; GatewayError 400 where a turn is none that can be scored."""
    turns = [(_role(message, index), _content(message, index)) for index, message in enumerate(messages)]
    if len(turns) == 1 and turns[0][0] == "User":
        text = turns[0][1]
    else:
        text = "\n\n".join(f"{role}: {content}" for role, content in turns)
    if not any(content.strip() for _, content in turns):
        raise GatewayError(400, "messages hold no text; give at least one turn a content", param="messages")
    return text


def _role(message: Mapping[str, Any], index: int) -> str:
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        known = ", ".join(_ROLES)
        text = f"messages[{index}].role must be one of {known}: turns of tools cannot be scored; ask the LLM directly"
        raise GatewayError(400, text, param=f"messages[{index}].role")
    return _ROLES[role]


def _content(message: Mapping[str, Any], index: int) -> str:
    """The text of a turn; the texts of several parts, a line each."""
    where = f"messages[{index}].content"
    content = message.get("content")
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise GatewayError(400, f"{where} must be a text or a list of text parts", param=where)
    return "\n".join(_part(part, f"{where}[{number}]") for number, part in enumerate(content))


def _part(part: object, where: str) -> str:
    if not isinstance(part, dict) or part.get("type") != "text":
        text = f"{where} is no text part; images, sound and files cannot be scored: ask the LLM directly for them"
        raise GatewayError(400, text, param=where)
    if not isinstance(part.get("text"), str):
        raise GatewayError(400, f"{where}.text must be a text", param=f"{where}.text")
    return str(part["text"])
