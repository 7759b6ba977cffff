"""Conversations in each model's chat template: which tokens are content, which the template's, which are targets.

The contents are the same text for both models, and stay text even where they look like special tokens; those are
recognised only in the template's text between the contents. Both are encoded separately, so that a content's bytes are
known. Where no token would span their boundary, and templates are made so, the tokens are those of the rendered text.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from jinja2 import TemplateError

from sar_kd.data.blocks import pack_streams
from sar_kd.data.samples import Conversation
from sar_kd.errors import UsageError
from sar_kd.tokenization.backends import encode
from sar_kd.tokenization.long_text import ANCHORS, encode_after, encode_texts
from sar_kd.tokenization.token_stream import PROMPT, RESPONSE, STOP, TEMPLATE, Span, concatenate_spans
from sar_kd.tokenization.token_table import Ids, TokenTable, build_token_table
from sar_kd.tokenization.tokenizer_pair import TokenizerPair

DEFAULT_TEMPLATE = (
    "{% for message in messages %}{{ message.role | capitalize + ':\\n' + message.content }}"
    "{% if not loop.last %}{{ '\\n\\n' }}{% endif %}{% endfor %}"
)
"""For a model without a chat template. A content follows a line end: a space would belong to its first word."""

_PLACEHOLDER = re.compile("\ue000([0-9]+)\ue001")


class Rendered(NamedTuple):
    """Conversations in both models' tokens."""

    names: list[str]
    sides: list[list[list[Span]]]
    """The student's spans of each conversation, and the teacher's where the tokenizers differ."""
    tables: list[TokenTable]
    """The table of each side."""
    skipped_documents: list[str]
    """Names of those that a chat template or a tokenizer changes or rejects, each with the reason."""
    changed_bytes: int
    """Bytes of the targets of those that a tokenizer changes."""
    without_template: tuple[str, ...]
    """'student', 'teacher': which of the templates has taken `DEFAULT_TEMPLATE` so far."""


class _Turns(NamedTuple):
    """A conversation's contents as both models read them, each model with its own template text around them."""

    conversation: Conversation
    contents: list[str]
    separators: list[list[str]]
    """By side: the template's text before each content, and after the last."""


class _SkippedConversation(ValueError):
    """Why a conversation is skipped."""


def render(conversations: list[Conversation], templates: list[ChatTemplate]) -> Rendered:
    """Encode conversations as each of `chat_templates(pair)` renders them."""
    turns, names, skipped, changed_bytes = [], [], [], 0
    for conversation in conversations:
        try:
            turns.append(_turns(conversation, templates))
        except _SkippedConversation as reason:
            skipped.append(f"{conversation.name} ({reason})")
    sides: list[list[list[Span]]] = [[] for _ in templates]
    encoded = [template.encode_contents(turns, side) for side, template in enumerate(templates)]
    for each, *contents in zip(turns, *encoded, strict=True):
        name, messages = each.conversation.name, each.conversation.messages
        changing = next((t for t, own in zip(templates, contents, strict=True) if own is None), None)
        if changing is not None:
            skipped.append(f"{name} (the {changing.whose}'s tokenizer changes its text)")
            changed_bytes += sum(len(message.content.encode()) for message in messages if message.is_target)
            continue
        names.append(name)
        # A dummy space that both tokenizers put is text to both models.
        is_text = [all(span.has_dummy for span in same) for same in zip(*contents, strict=True)]
        for side, template in enumerate(templates):
            own = [span._replace(dummy_is_text=both) for span, both in zip(contents[side], is_text, strict=True)]
            sides[side].append(template.interleave(each.separators[side], own))
    without = tuple(template.whose for template in templates if template.took_default)
    if without and len(templates) == 1:
        without = "student", "teacher"
    return Rendered(names, sides, [template.table for template in templates], skipped, changed_bytes, without)


def chat_templates(pair: TokenizerPair) -> list[ChatTemplate]:
    """The template of each token stream: a single one where the tokenizers are taken as equal.

    Raises: UsageError if tokenizers taken as equal have different templates, or their tokens' bytes cannot be known
    """
    if pair.tables is not None:
        student, teacher = pair.tables
        return [ChatTemplate("student", pair.student, student), ChatTemplate("teacher", pair.teacher, teacher)]
    if _template_of(pair.student) != _template_of(pair.teacher):
        raise UsageError(
            "--alignment auto: the tokenizers are equal and their chat templates differ, so that the models read a "
            "conversation in different tokens; use --alignment projection"
        )
    try:
        return [ChatTemplate("student", pair.student, build_token_table(pair.student, len(pair.student)))]
    except ValueError as error:
        raise UsageError(f"--student_model: conversations need exact tokens, and its tokenizer {error}") from None


def _template_of(tokenizer) -> str | None:
    template = getattr(tokenizer, "chat_template", None)
    return template.get("default") if isinstance(template, dict) else template


def _turns(conversation: Conversation, templates: list[ChatTemplate]) -> _Turns:
    """The contents as given or, where a template strips them, stripped for both models."""
    contents = [message.content for message in conversation.messages]
    try:
        "".join(contents).encode()
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can hold and no encoding can
        raise _SkippedConversation("is no Unicode text") from None
    for template in templates:
        contents = [template.table.canonical(text) for text in contents]
    try:
        return _Turns(conversation, contents, [t.separators(conversation, contents) for t in templates])
    except _SkippedConversation:
        contents = [text.strip() for text in contents]
        return _Turns(conversation, contents, [t.separators(conversation, contents) for t in templates])


class ChatTemplate:
    """One model's chat template and tokenizer."""

    def __init__(self, whose: str, tokenizer, table: TokenTable):
        """whose: 'student' or 'teacher'"""
        self.whose, self.tokenizer, self.table = whose, tokenizer, table
        self.took_default = False
        """It has rendered a conversation with `DEFAULT_TEMPLATE`"""
        self.change = ""
        """The first content that the tokenizer changed, as `TokenTable.describe_change`"""
        self._template = _template_of(tokenizer)
        self._end_ids = frozenset(table.end_ids)
        self._separators: dict[tuple[str, ...], list[str]] = {}
        self._separator_ids: dict[tuple[str, bool, bool], list[int]] = {}
        self._dummy_after: dict[str, bool] = {}

    # Text

    def separators(self, conversation: Conversation, contents: list[str]) -> list[str]:
        """The template's text before each content of a conversation, and after the last.

        Raises: _SkippedConversation if the template rejects the conversation or changes a content
        """
        if self._template is None and conversation.plain:
            return [""] * (len(contents) + 1)
        roles = tuple(message.role for message in conversation.messages)
        if roles not in self._separators:
            self._separators[roles] = self._split_template(roles)
        separators = self._separators[roles]
        joined = separators[0] + "".join(map("".join, zip(contents, separators[1:], strict=True)))
        if self._apply(roles, contents) != joined:
            raise _SkippedConversation(f"the {self.whose}'s chat template changes the text of a message")
        self.took_default |= self._template is None
        return separators

    def _split_template(self, roles: tuple[str, ...]) -> list[str]:
        """The template rendered with a placeholder for each content, split there."""
        parts = _PLACEHOLDER.split(self._apply(roles, [f"\ue000{i}\ue001" for i in range(len(roles))]))
        found = [int(number) for number in parts[1::2]]
        if found != list(range(len(roles))):
            fault = "repeats" if len(set(found)) < len(found) else "drops" if len(found) < len(roles) else "reorders"
            raise _SkippedConversation(f"the {self.whose}'s chat template {fault} messages ({', '.join(roles)})")
        return parts[::2]

    def _apply(self, roles: tuple[str, ...], contents: list[str]) -> str:
        messages = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=True)]
        template = self._template or DEFAULT_TEMPLATE
        try:
            return self.tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise _SkippedConversation(f"the {self.whose}'s chat template refuses it: {reason}") from None

    # Tokens

    def encode_contents(self, turns: list[_Turns], side: int) -> list[list[Span] | None]:
        """The contents of each conversation; None for one with a content that the tokenizer changes.

        side: of this template in `_Turns.separators`
        """
        encoded = iter(encode_texts(self.tokenizer, [text for each in turns for text in each.contents]))
        found: list[list[Span] | None] = []
        for each in turns:
            messages = zip(each.conversation.messages, each.contents, each.separators[side], strict=False)
            spans = [
                self._encode_content(next(encoded), RESPONSE if message.is_target else PROMPT, text, separator, not i)
                for i, (message, text, separator) in enumerate(messages)
            ]
            unchanged = [span for span in spans if span is not None]
            found.append(unchanged if len(unchanged) == len(spans) else None)
        return found

    def _encode_content(self, ids: Ids | None, kind: int, text: str, separator: str, first: bool) -> Span | None:
        dummy = None if ids is None else self.table.dummy_bytes(ids, text)
        if ids is None or dummy is None:
            self.change = self.change or self.table.describe_change([] if ids is None else ids, text)
            return None
        if dummy and not separator.endswith(" ") and not self._puts_dummy_after(separator, first):
            for anchor in ANCHORS:
                own = encode_after(self.tokenizer, anchor, text)
                if own is not None:
                    return Span(own, kind)
        return Span(ids, kind, bool(dummy))

    def _puts_dummy_after(self, separator: str, first: bool) -> bool:
        """Would the tokenizer, given the whole rendered text, put a dummy space between a separator and a content?"""
        if not separator:
            return first
        if separator not in self._dummy_after:
            apart = self._template_ids(separator) + encode(self.tokenizer, ["a"])[0]
            self._dummy_after[separator] = self._template_ids(separator + "a") == apart
        return self._dummy_after[separator]

    def interleave(self, separators: list[str], contents: list[Span]) -> list[Span]:
        """Template text, contents and stop tokens in order."""
        spans: list[Span] = []
        for i, separator in enumerate(separators):
            is_last = i == len(contents)
            if not is_last and contents[i].has_dummy and separator.endswith(" "):
                separator = separator[:-1]  # the dummy space stands for it
            ids = self._ids_of_separator(separator, not i, is_last)
            if i and contents[i - 1].kind == RESPONSE:
                num_stop = self._num_stop_tokens(separator, ids)
                spans.append(Span(ids[:num_stop] if num_stop else [self.table.end_id], STOP))
                ids = ids[num_stop:]
            if ids:
                spans.append(Span(ids, TEMPLATE))
            spans += contents[i : i + 1]
        return spans

    def _num_stop_tokens(self, separator: str, ids: list[int]) -> int:
        """How many tokens of the separator after a response the model has to predict to stop; 0 if none stops it."""
        at = next((i for i, token in enumerate(ids) if token in self._end_ids), None)
        if at is None:
            return 0
        # White space before the stop token, as in Llama 2's template, would otherwise never be a target.
        return 0 if separator.partition(self.table.strings[ids[at]])[0].strip() else at + 1

    def _ids_of_separator(self, text: str, first: bool, last: bool) -> list[int]:
        """Ids of a separator as it is cut between contents.

        first: it opens the block, which has a start token already; last: nothing follows
        """
        if (text, first, last) not in self._separator_ids:
            # A dummy space before what follows would take in the separator's own last space.
            before, after = "" if first else "a", "" if last or self.table.dummy_prefix else "a"
            ids = next(
                ids
                for context in ((before, after), (before, ""), ("", ""))
                if (ids := self._ids_between(text, *context)) is not None
            )
            self._separator_ids[text, first, last] = ids[1:] if first and ids[:1] == [self.table.start_id] else ids
        return self._separator_ids[text, first, last]

    def _ids_between(self, text: str, before: str, after: str) -> list[int] | None:
        """Ids of a separator between these texts; None if a token spans it and one of them."""
        prefix, whole, suffix = map(self._template_ids, (before, before + text + after, after))
        end = len(whole) - len(suffix)
        fits = whole[: len(prefix)] == prefix and whole[end:] == suffix
        return whole[len(prefix) : end] if fits else None

    def _template_ids(self, text: str) -> list[int]:
        """Ids of a template's text, special tokens recognised."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


def truncate_conversation(
    whole: list[list[Span]], tables: list[TokenTable], limits: tuple[int, int]
) -> list[list[Span]] | None:
    """A conversation in each side's tokens, cut at the last place within the limits where both end a token.

    None if no target is left
    """
    if num_tokens(whole[0]) <= limits[0] and num_tokens(whole[-1]) <= limits[1]:
        return whole
    ends = [concatenate_spans([spans], table)[0].ends for spans, table in zip(whole, tables, strict=True)]
    try:
        block = next(pack_streams(ends[0], ends[-1], *limits))
    except UsageError:
        return None
    kept = [
        _first_tokens(spans, end) for spans, end in zip(whole, (block.student_end, block.teacher_end), strict=False)
    ]
    return kept if all(num_tokens(spans, targets=True) for spans in kept) else None


def _first_tokens(spans: list[Span], count: int) -> list[Span]:
    kept: list[Span] = []
    for span in spans:
        if count > 0:
            kept.append(span._replace(ids=span.ids[:count]))
        count -= len(span.ids)
    return kept


def num_tokens(spans: list[Span], targets: bool = False) -> int:
    """Tokens of some spans, or their targets."""
    return sum(len(span.ids) for span in spans if span.kind >= RESPONSE or not targets)
