"""An Ollama Modelfile for a student: its chat template in Ollama's language, and its stop tokens.

Ollama runs no Jinja: of a file whose chat template resembles none that it knows, it hands over the last message and
nothing else. So the text that the template writes around the messages is found by rendering it, put into a template of
one form in Go's language, and compared with what the template writes for other conversations.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sar_kd.data.chat.templates import TemplateFailure, TemplateSandbox, TooMuchWork
from sar_kd.tokenization.backends import called_ids

_SYSTEM, _USER, _ANSWER, _NEXT = (f"content{i}of{i}message" for i in range(1, 5))
"""Contents whose places are looked for in what a template writes"""

_CONVERSATIONS = ("u", "uau", "uauau", "su", "suau", "suauau")
"""What is compared: the roles by their initials"""

_ROLES = {"s": "system", "u": "user", "a": "assistant"}


@dataclass(frozen=True)
class OllamaTemplate:
    """The text around messages: before, and where a template treats a system message in its own way, around that."""

    start: str
    """Before the first message where there is no system message"""
    user: tuple[str, str]
    """Before and behind a user's message"""
    assistant: tuple[str, str]
    system: tuple[str, str] | None
    """Before the system message, and from there to the first user's; None: the template takes none"""
    generation: str
    """Before an answer"""

    def render(self, messages: Sequence[dict[str, str]]) -> str:
        """What Ollama makes of a conversation that ends with a user's message."""
        first, text = messages[0], self.start
        if first["role"] == "system" and self.system:
            text = self.system[0] + first["content"] + self.system[1]
        for number, message in enumerate(messages):
            if message["role"] != "system":
                before, behind = self.user if message["role"] == "user" else self.assistant
                before = "" if number == 1 and first["role"] == "system" and self.system else before
                text += before + message["content"] + behind
        return text + self.generation

    def parts(self) -> tuple[str, ...]:
        """Every text around messages."""
        return (self.start, *self.user, *self.assistant, *(self.system or ()), self.generation)

    def go(self) -> str:
        """The template in Go's language, of which Ollama appends the answer itself."""
        start, (user, user_end), (answer, answer_end) = self.start, self.user, self.assistant
        if self.system:
            before, behind = self.system
            start = "".join(("{{ if .System }}", before, "{{ .System }}", behind, "{{ else }}", start, "{{ end }}"))
            user = "{{ if not (and $.System (eq $i 1)) }}" + user + "{{ end }}"
        return "".join((
            start, "{{ range $i, $m := .Messages }}", '{{ if eq .Role "user" }}', user, "{{ .Content }}", user_end,
            '{{ else if eq .Role "assistant" }}', answer, "{{ .Content }}", answer_end, "{{ end }}{{ end }}",
            self.generation,
        ))  # fmt: skip


def find_template(tokenizer: Any) -> OllamaTemplate | None:
    """A tokenizer's chat template in Ollama's form; None if it is not of this form."""
    template = tokenizer.chat_template
    template = template["default"] if isinstance(template, dict) else template
    ids, start = called_ids(tokenizer, "a"), tokenizer.bos_token or ""
    now = datetime.now()
    puts_start = bool(start) and list(ids[:1]) == [tokenizer.bos_token_id]

    def write(roles: str, contents: Sequence[str], generation: bool = True) -> str:
        text = TemplateSandbox(template, now).render(
            _messages(roles, contents), tools=None, documents=None, add_generation_prompt=generation,
            **tokenizer.special_tokens_map,
        )  # fmt: skip
        return text.removeprefix(start) if puts_start else text  # llama.cpp puts it, as the tokenizer does

    try:
        found = _find(write)
        for roles in _CONVERSATIONS:
            contents = [f"{role}{i} text\nof {i}" for i, role in enumerate(roles)]
            if found.system or roles[0] == "u":
                _require(found.render(_messages(roles, contents)) == write(roles, contents))
    except (_OtherForm, TemplateFailure, TooMuchWork):
        return None
    return None if any("{{" in part or part.endswith("{") or '"""' in part for part in found.parts()) else found


class _OtherForm(ValueError):
    """A template does something else than to put text around the messages."""


def _require(holds: bool) -> None:
    if not holds:
        raise _OtherForm


def _messages(roles: str, contents: Sequence[str]) -> list[dict[str, str]]:
    return [{"role": _ROLES[role], "content": text} for role, text in zip(roles, contents, strict=True)]


def _find(write: Callable[..., str]) -> OllamaTemplate:
    before, behind = _around(write("u", [_USER]), _USER)
    user_end = _around(write("u", [_USER], False), _USER)[1]
    _, between, to_next, _ = _around(write("uau", [_USER, _ANSWER, _NEXT]), _USER, _ANSWER, _NEXT)
    answer_end = _around(write("ua", [_USER, _ANSWER], False), _USER, _ANSWER)[2]
    _require(behind.startswith(user_end) and between.startswith(user_end) and to_next.startswith(answer_end))
    user_start = to_next.removeprefix(answer_end)
    if not before.endswith(user_start):  # text between messages that is not before the first
        user_start = next(before[i:] for i in range(len(before) + 1) if to_next.endswith(before[i:]))
    system: tuple[str, str] | None = None
    with contextlib.suppress(TemplateFailure, _OtherForm):  # it takes no system message, or drops it
        system_start, to_user, _ = _around(write("su", [_SYSTEM, _USER]), _SYSTEM, _USER)
        system = system_start, to_user
    return OllamaTemplate(
        start=before.removesuffix(user_start),
        user=(user_start, user_end),
        assistant=(between.removeprefix(user_end), to_next.removesuffix(user_start)),
        system=system,
        generation=behind.removeprefix(user_end),
    )


def _around(text: str, *contents: str) -> tuple[str, ...]:
    """The text before, between and behind the contents, each of which it has to hold once and in this order."""
    parts = tuple(re.split("|".join(contents), text))
    _require(
        len(parts) == len(contents) + 1 and text == "".join(map("".join, zip(parts, (*contents, ""), strict=True)))
    )
    return parts


def modelfile(gguf: str, tokenizer: Any, stop_ids: Sequence[int]) -> tuple[str, str]:
    """An Ollama Modelfile, and a line about it.

    gguf: the file, relative to the Modelfile; stop_ids: with each of which an answer ends
    """
    stops = [tokenizer.convert_ids_to_tokens(id_) for id_ in stop_ids]
    lines = [f"FROM ./{gguf}"]
    if not tokenizer.chat_template:
        lines.append('TEMPLATE """{{ .Prompt }}"""')
        said = "no chat template: the prompt is continued as it is"
    elif found := find_template(tokenizer):
        lines.append(f'TEMPLATE """{found.go()}"""')
        said = "the chat template in Ollama's form" + ("" if found.system else ", which takes no system message")
    else:
        lines.append(
            "# No TEMPLATE: the chat template of this model has no equal in Ollama's form. Ollama uses one of its"
        )
        lines.append("# own where it knows the template in the GGUF file, and else hands the prompt over as it is.")
        said = (
            "Warning: no template, as the chat template has no equal in Ollama's form; llama.cpp reads it in the file"
        )
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    return "\n".join(lines) + "\n", f"{said}; stop tokens {' '.join(stops) or 'none'}"
