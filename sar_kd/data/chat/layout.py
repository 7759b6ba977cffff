"""Where the texts of a conversation stand in what a chat template writes, and where each answer begins.

The texts are the contents of the messages and the assistant's reasoning. A template is rendered with a placeholder for
each, which gives its own text between them, and then with the texts, which must give the same. An answer begins where
the generation prompt ends: what the template writes behind that is for the model to write.
"""

from __future__ import annotations

import contextlib
import copy
import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from sar_kd.data.chat.templates import TemplateFailure, TemplateSandbox, TooMuchWork
from sar_kd.data.files.samples import Conversation
from sar_kd.errors import UsageError

REASONING = ("reasoning_content", "thinking", "reasoning")
"""Fields of a message that hold its reasoning; a template may read any of them."""

_TAGS = re.compile(r"(\s*(?:</?(?:think|thinking|reasoning|tool_call|tool_response)>|\[/?THINK\])\s*)")
"""What templates look for inside a content."""

_PLACEHOLDER = re.compile("\ue000([0-9]+)\ue001")

_MARK = "760214"
_MARKED = re.compile(f"_{_MARK}([0-9]+)_")
"""What stands behind the name of a call, to see whether it is written"""

_MAX_RENDERED = 16
"""Messages of a conversation's beginning that are rendered to find where it ends, and those back to the user's"""

_MAX_STRUCTURES = 1000
"""Layouts that are kept; conversations with tools have one each."""

_MAX_ENDLESS = 3
"""Conversations on which a template may exceed its limit before the run is refused."""


class SkippedConversation(ValueError):
    """Why a conversation is skipped."""


class Text(NamedTuple):
    """One text of a conversation."""

    message: int
    """Number of its message"""
    text: str


class Form(NamedTuple):
    """A conversation as it is handed to a template, and the same with a placeholder for each of its texts."""

    texts: list[Text]
    messages: list[dict]
    with_placeholders: list[dict]


class Layout(NamedTuple):
    """A conversation in one template."""

    texts: tuple[int, ...]
    """Which of the form's texts the template writes, ascending"""
    separators: tuple[str, ...]
    """The template's own text before each of them, and behind the last"""
    starts: tuple[tuple[int, ...], ...]
    """For each separator, the characters of it before each answer that begins in it"""
    ends: tuple[tuple[int, ...], ...]
    """For each separator, the characters of it up to the end of each message that ends in it, where that is known"""
    answers: frozenset[int]
    """Numbers of the messages that are predicted: those of which the template drops nothing"""


def forms(conversation: Conversation, contents: Sequence[str]) -> Iterator[Form]:
    """The conversation as given, stripped, and with its contents cut at the tags that templates look for.

    Several templates strip contents, take reasoning out of them, or write the result of a tool in another form. Where
    an answer has tags, they are tried first: the generation prompt may hold the first of them.
    """
    stripped = [text.strip() for text in contents]
    cut = [
        _TAGS.split(text) if message.role == "assistant" else [text]
        for text, message in zip(stripped, conversation.messages, strict=True)
    ]
    has_tags = any(len(pieces) > 1 for pieces in cut)
    if has_tags:
        yield _form(conversation, cut, is_cut=True)
    yield _form(conversation, [[text] for text in contents], is_cut=False)
    yield _form(conversation, [[text] for text in stripped], is_cut=False)
    if not has_tags:
        yield _form(conversation, cut, is_cut=True)


def _form(conversation: Conversation, contents: list[list[str]], is_cut: bool) -> Form:
    """contents: each as texts and tags in turn; is_cut: empty texts and results of tools have no placeholder"""
    form = Form([], [], [])
    for number, (message, pieces) in enumerate(zip(conversation.messages, contents, strict=True)):
        fields = json.loads(message.fields) if message.fields else {}
        reasoning = next((fields[name] for name in REASONING if isinstance(fields.get(name), str)), "")
        thinking = {}
        if reasoning.strip():
            written, placeholder = _fill(form, number, [reasoning.strip()])
            fields |= dict.fromkeys(REASONING, written)
            thinking = dict.fromkeys(REASONING, placeholder)
        fixed = is_cut and (message.role in ("tool", "function") or pieces == [""])
        content, placeholder = ("".join(pieces),) * 2 if fixed else _fill(form, number, pieces)
        form.messages.append({"role": message.role, "content": content, **fields})
        form.with_placeholders.append({"role": message.role, "content": placeholder, **fields, **thinking})
    return form


def _fill(form: Form, number: int, pieces: list[str]) -> tuple[str, str]:
    """Add the texts among pieces to a form. Returns: all pieces joined, and the same with placeholders"""
    written = list(pieces)
    for i in range(0, len(pieces), 2):
        if pieces[i] or len(pieces) == 1:
            written[i] = f"\ue000{len(form.texts)}\ue001"
            form.texts.append(Text(number, pieces[i]))
    return "".join(pieces), "".join(written)


class LayoutFinder:
    """One model's chat template."""

    def __init__(self, whose: str, sandbox: TemplateSandbox, variables: dict):
        """whose: 'student' or 'teacher'; variables: the special tokens by name"""
        self.whose, self._sandbox, self._variables = whose, sandbox, variables
        self._known: dict[str, Layout] = {}
        self._num_endless = 0

    def find(self, conversation: Conversation, form: Form) -> Layout:
        """The conversation in this template.

        Raises: SkippedConversation if the template fails on it, or changes, repeats, moves or drops a text that is not
        the assistant's; UsageError if it exceeds its limit again and again
        """
        tools = json.loads(conversation.tools) if conversation.tools else None
        is_target = [message.is_target for message in conversation.messages]
        key = json.dumps([form.with_placeholders, is_target, tools])
        if key not in self._known:
            if len(self._known) >= _MAX_STRUCTURES:
                self._known.clear()
            self._known[key] = self._layout(conversation, form, tools)
        layout = self._known[key]
        texts = [form.texts[i].text for i in layout.texts]
        joined = "".join(map("".join, zip(layout.separators, [*texts, ""], strict=True)))
        if self._render(form.messages, tools) != joined:
            raise SkippedConversation(f"the {self.whose}'s chat template changes the text of a message")
        return layout

    def _layout(self, conversation: Conversation, form: Form, tools: list | None) -> Layout:
        messages = form.with_placeholders
        whole = self._render(messages, tools)
        pieces = _PLACEHOLDER.split(whole)
        separators, found = pieces[::2], tuple(map(int, pieces[1::2]))
        written = set(found)
        missing = {text.message for i, text in enumerate(form.texts) if i not in written and text.text.strip()}
        dropped = {number for number in missing if conversation.messages[number].role != "assistant"}
        if dropped or list(found) != sorted(written) or max(found, default=-1) >= len(form.texts):
            fault = "repeats" if len(written) < len(found) else "drops" if dropped else "reorders"
            roles = ", ".join(message.role for message in conversation.messages)
            raise SkippedConversation(f"the {self.whose}'s chat template {fault} messages ({roles})")
        missing |= self._dropped_tool_calls(messages, whole, tools)
        places = [match.span() for match in _PLACEHOLDER.finditer(whole)]
        lows, highs = [0, *(end for _, end in places)], [*(start for start, _ in places), len(whole)]
        writers = [form.texts[i].message for i in found]
        starts: list[list[int]] = [[] for _ in separators]
        ends: list[list[int]] = [[] for _ in separators]
        answers = set()
        for number, message in enumerate(conversation.messages):
            if not message.is_target or number in missing:
                continue
            before, behind = bisect_left(writers, number), bisect_right(writers, number)
            low, high = lows[before], highs[before]
            start = self._start_of(messages, number, whole, tools, low + max(starts[before], default=0), high)
            if start is None and behind > before:
                start = high
            if start is None:
                continue
            answers.add(number)
            starts[before].append(start - low)
            until = self._beginning(messages, number + 1, whole, tools) if number + 1 < len(messages) else whole
            if whole.startswith(until) and lows[behind] <= len(until):
                ends[behind].append(len(until) - lows[behind])
        return Layout(found, tuple(separators), tuple(map(tuple, starts)), tuple(map(tuple, ends)), frozenset(answers))

    def _beginning(self, messages: list[dict], count: int, whole: str, tools, add_generation_prompt=False) -> str:
        """What the template writes for the first `count` messages.

        Of many only the last are rendered, from a user's message on; what stands before it is that of the whole text.
        """
        first = next((i for i in range(count - _MAX_RENDERED, 0, -1) if messages[i]["role"] == "user"), 0)
        user = _PLACEHOLDER.search(str(messages[first]["content"])) if first else None
        if user is not None:
            system = messages[:1] if messages[0]["role"] == "system" else []
            with contextlib.suppress(SkippedConversation):  # some templates do not take a part of a conversation
                last = self._render([*system, *messages[first:count]], tools, add_generation_prompt)
                if (at := last.find(user[0])) >= 0:
                    return whole[: whole.find(user[0])] + last[at:]
        return self._render(messages[:count], tools, add_generation_prompt)

    def _start_of(self, messages: list[dict], number: int, whole: str, tools, low: int, high: int) -> int | None:
        """Where a message's answer begins, between two places of the whole text: behind the generation prompt."""
        try:
            prompt = self._beginning(messages, number, whole, tools, add_generation_prompt=True)
            if whole.startswith(prompt) and low <= len(prompt) <= high:
                return len(prompt)
            without = self._beginning(messages, number, whole, tools)
        except SkippedConversation:  # some templates do not take the beginning of a conversation
            return None
        # Some write an earlier turn in another way once others follow; the generation prompt itself stays.
        added = prompt.removeprefix(without) if prompt.startswith(without) else ""
        at = whole.rfind(added, low, high) if added else -1
        return None if at < 0 else at + len(added)

    def _dropped_tool_calls(self, messages: list[dict], whole: str, tools: list | None) -> set[int]:
        """The messages whose calls the template does not write: other names, with their numbers, do not show."""
        calling = [number for number, message in enumerate(messages) if message.get("tool_calls")]
        if not calling:
            return set()
        others, unnamed = copy.deepcopy(messages), set()
        for number in calling:
            calls = others[number]["tool_calls"]
            calls = [call for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []
            named = [each for each in (call.get("function", call) for call in calls) if isinstance(each, dict)]
            for call in named:
                call["name"] = f"{call.get('name', '')}_{_MARK}{number}_"
            if not named:
                unnamed.add(number)
        shown = set(map(int, _MARKED.findall(self._render(others, tools))))
        for number in unnamed:
            others[number] = {name: value for name, value in messages[number].items() if name != "tool_calls"}
            if self._render([*messages[:number], others[number], *messages[number + 1 :]], tools) != whole:
                shown.add(number)
        return set(calling) - shown

    def _render(self, messages: list[dict], tools: list | None, add_generation_prompt: bool = False) -> str:
        try:
            return self._sandbox.render(
                messages, tools=tools, documents=None, add_generation_prompt=add_generation_prompt, **self._variables
            )
        except TooMuchWork as error:
            self._num_endless += 1
            if self._num_endless >= _MAX_ENDLESS:
                raise UsageError(f"--{self.whose}_model: its chat template does not end: {error}") from None
            raise SkippedConversation(f"the {self.whose}'s chat template does not end: {error}") from None
        except TemplateFailure as error:
            raise SkippedConversation(f"the {self.whose}'s chat template refuses it: {error}") from None
