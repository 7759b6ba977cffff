"""Forms in which public data holds conversations, as lists of messages with `role` and `content`.

Alpaca: `instruction`, perhaps `input`, and `output`; also Dolly's `context` and `response`.
ShareGPT: `conversations` of `from` and `value`.
"""

from __future__ import annotations

from typing import Any

_INSTRUCTION, _INPUTS, _OUTPUTS = "instruction", ("input", "context"), ("output", "response")

_CONVERSATIONS = "conversations"

_ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "model": "assistant", "observation": "tool", "function_response": "tool",
}  # fmt: skip

FIELDS = (_INSTRUCTION, *_INPUTS, *_OUTPUTS, _CONVERSATIONS, "system", "history")
"""Every field that is read"""


def has_known_form(fields: Any) -> bool:
    """Do these columns, or the keys of this example, hold one of the forms?"""
    return _CONVERSATIONS in fields or (_INSTRUCTION in fields and any(name in fields for name in _OUTPUTS))


def as_messages(example: dict[str, Any]) -> tuple[str, Any] | None:
    """The field that holds what is to be learned, and the conversation as `messages`; None for another form.

    What is not as the form says stays as it is, for the check of messages.
    """
    if not has_known_form(example):
        return None
    if _CONVERSATIONS in example:
        found = example[_CONVERSATIONS]
        turns = [_turn(turn) for turn in found] if isinstance(found, list) else found
        field = _CONVERSATIONS
    else:
        field = next(name for name in _OUTPUTS if name in example)
        prompt, more = example[_INSTRUCTION], next((example[name] for name in _INPUTS if example.get(name)), "")
        if isinstance(prompt, str) and isinstance(more, str) and more.strip():
            prompt = f"{prompt}\n\n{more}" if prompt.strip() else more
        turns = [*_earlier_turns(example.get("history")), {"role": "user", "content": prompt}]
        turns.append({"role": "assistant", "content": example[field]})
    system = example.get("system")
    if isinstance(turns, list) and isinstance(system, str) and system.strip():
        turns = [{"role": "system", "content": system}, *turns]
    return field, turns


def _turn(turn: Any) -> Any:
    """A turn of ShareGPT as a message."""
    if not isinstance(turn, dict):
        return turn
    names = {"from": "role", "value": "content"}
    message = {key if names.get(key) in (None, *turn) else names[key]: value for key, value in turn.items()}
    role = message.get("role")
    return message | {"role": _ROLES.get(role, role)} if isinstance(role, str) else message


def _earlier_turns(history: Any) -> list[Any]:
    """The turns of pairs (question, answer)."""
    if not history:
        return []
    if not (isinstance(history, list) and all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in history)):
        return [history]
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for pair in history for role, text in zip(roles, pair, strict=True)]
