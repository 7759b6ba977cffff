"""Conversations in each model's chat template: which tokens are content, which the template's, which are targets.

The contents are the same text for both models, and stay text even where they look like special tokens; those are
recognised only in the template's text between the contents. Both are encoded separately, so that a content's bytes are
known. Where no token would span their boundary, and templates are made so, the tokens are those of the rendered text.
Predicted is all that the generation prompt does not hold: of an answer its contents, the template's text around them,
and the stop token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from itertools import chain, pairwise
from typing import NamedTuple

from sar_kd.data.blocks import pack_streams
from sar_kd.data.chat.layout import Form, Layout, LayoutFinder, SkippedConversation, forms
from sar_kd.data.chat.templates import TemplateFailure, TemplateSandbox, TooMuchWork
from sar_kd.data.files.samples import Conversation, Message
from sar_kd.errors import UsageError
from sar_kd.tokenization.backends import called_ids, encode
from sar_kd.tokenization.long_text import ANCHORS, encode_after, encode_texts
from sar_kd.tokenization.token_stream import FORMAT, PROMPT, RESPONSE, STOP, TEMPLATE, Span, concatenate_spans
from sar_kd.tokenization.token_table import SPECIAL, Ids, TokenTable, build_token_table
from sar_kd.tokenization.tokenizer_pair import TokenizerPair

DEFAULT_TEMPLATE = (
    "{% if bos_token != eos_token %}{{ bos_token }}{% endif %}"
    "{% for message in messages %}{{ message.role | capitalize + ':\\n' + message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% if not loop.last %}{{ '\\n\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n\\nAssistant:\\n' }}{% endif %}"
)
"""For a model without a chat template. A content follows a line end: a space would belong to its first word."""

_PLAIN_TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
"""For two texts and a model without a chat template"""


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
    dropped_answers: list[str]
    """For each answer that is not predicted because a template drops a part of it, its conversation and whose."""


class _Turns(NamedTuple):
    """A conversation's texts as both models read them, each model with its own template text around them."""

    conversation: Conversation
    form: Form
    layouts: list[Layout]
    """By side"""
    answers: frozenset[int]
    """Numbers of the messages that are predicted"""
    written: frozenset[int]
    """The texts that every template writes"""

    def kind_of(self, text: int) -> int:
        """The kind of a text's tokens; one that the other template drops counts as the template's."""
        if text not in self.written:
            return TEMPLATE
        return RESPONSE if self.form.texts[text].message in self.answers else PROMPT

    def num_target_bytes(self) -> int:
        texts = enumerate(self.form.texts)
        return sum(len(text.text.encode()) for i, text in texts if self.kind_of(i) == RESPONSE)


def render(conversations: list[Conversation], templates: list[ChatTemplate]) -> Rendered:
    """Encode conversations as each of `chat_templates(pair)` renders them."""
    turns, names, skipped, changed_bytes = [], [], [], 0
    dropped: list = []
    for conversation in conversations:
        try:
            turns.append(_turns(conversation, templates, dropped))
        except SkippedConversation as reason:
            skipped.append(f"{conversation.name} ({reason})")
    sides: list[list[list[Span]]] = [[] for _ in templates]
    encoded = [template.encode_contents(turns, side) for side, template in enumerate(templates)]
    for each, *contents in zip(turns, *encoded, strict=True):
        name = each.conversation.name
        changing = next((t for t, own in zip(templates, contents, strict=True) if own is None), None)
        if changing is not None:
            skipped.append(f"{name} (the {changing.whose}'s tokenizer changes its text)")
            changed_bytes += each.num_target_bytes()
            continue
        names.append(name)
        # A dummy space that both tokenizers put is text to both models.
        by_text = [dict(zip(own.texts, spans, strict=True)) for own, spans in zip(each.layouts, contents, strict=True)]
        is_text = [all(i in own and own[i].has_dummy for own in by_text) for i in range(len(each.form.texts))]
        for side, template in enumerate(templates):
            own = [span._replace(dummy_is_text=is_text[i]) for i, span in by_text[side].items()]
            sides[side].append(template.interleave(each, side, own))
    without = tuple(template.whose for template in templates if template.took_default)
    if without and len(templates) == 1:
        without = "student", "teacher"
    tables = [template.table for template in templates]
    return Rendered(names, sides, tables, skipped, changed_bytes, without, dropped)


def chat_templates(pair: TokenizerPair) -> list[ChatTemplate]:
    """The template of each token stream: a single one where the tokenizers are taken as equal.

    Raises: UsageError if tokenizers taken as equal have different templates, or their tokens' bytes cannot be known
    """
    now = datetime.fromisoformat(pair.template_date)
    if pair.tables is not None:
        student, teacher = pair.tables
        return [
            ChatTemplate("student", pair.student, student, now),
            ChatTemplate("teacher", pair.teacher, teacher, now),
        ]
    if getattr(pair.student, "chat_template", None) != getattr(pair.teacher, "chat_template", None):
        raise UsageError(
            "--alignment auto: the tokenizers are equal and their chat templates differ, so that the models read a "
            "conversation in different tokens; use --alignment projection"
        )
    try:
        return [ChatTemplate("student", pair.student, build_token_table(pair.student, pair.student_vocab_size), now)]
    except ValueError as error:
        raise UsageError(f"--student_model: conversations need exact tokens, and its tokenizer {error}") from None


def _turns(conversation: Conversation, templates: list[ChatTemplate], dropped: list[str]) -> _Turns:
    """The contents in the first form that no template changes. dropped: takes the answers that one drops"""
    if conversation.fault:
        raise SkippedConversation(conversation.fault)
    contents = [message.content for message in conversation.messages]
    try:
        "".join(contents).encode()
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can hold and no encoding can
        raise SkippedConversation("is no Unicode text") from None
    for template in templates:
        contents = [template.table.canonical(text) for text in contents]
    refusal: SkippedConversation | None = None
    for form in forms(conversation, contents):
        try:
            layouts = [template.find_layout(conversation, form) for template in templates]
            break
        except SkippedConversation as error:
            refusal = refusal or error
    else:
        assert refusal is not None
        raise refusal
    answers = frozenset.intersection(*(layout.answers for layout in layouts))
    for number in (i for i, message in enumerate(conversation.messages) if message.is_target and i not in answers):
        whose = next(t.whose for t, layout in zip(templates, layouts, strict=True) if number not in layout.answers)
        reason = f"the {whose}'s chat template drops a part of the answer"
        if not answers:
            raise SkippedConversation(reason)
        dropped.append(f"{conversation.name} ({reason})")
    written = frozenset.intersection(*(frozenset(layout.texts) for layout in layouts))
    return _Turns(conversation, form, layouts, answers, written)


class ChatTemplate:
    """One model's chat template and tokenizer."""

    def __init__(self, whose: str, tokenizer, table: TokenTable, now: datetime):
        """whose: 'student' or 'teacher'; now: the date that the template may write"""
        self.whose, self.tokenizer, self.table = whose, tokenizer, table
        self.took_default = False
        """It has rendered a conversation with `DEFAULT_TEMPLATE`"""
        self.change = ""
        """The first content that the tokenizer changed, as `TokenTable.describe_change`"""
        self._now = now
        self._end_ids = frozenset(table.end_ids)
        self._finders: dict[str, LayoutFinder] = {}
        self._separator_ids: dict[tuple[str, bool, bool], list[int]] = {}
        self._dummy_after: dict[str, bool] = {}

    # Text

    def find_layout(self, conversation: Conversation, form: Form) -> Layout:
        """The conversation in this template. Raises: SkippedConversation, UsageError as `LayoutFinder.find`"""
        template = getattr(self.tokenizer, "chat_template", None)
        if isinstance(template, dict):
            template = template.get("tool_use" if conversation.tools else "default") or template.get("default")
        is_default = not template and not conversation.plain
        template = template or (_PLAIN_TEMPLATE if conversation.plain else DEFAULT_TEMPLATE)
        if template not in self._finders:
            try:
                sandbox = TemplateSandbox(template, self._now)
            except TemplateFailure as error:
                raise SkippedConversation(f"the {self.whose}'s chat template cannot be used: {error}") from None
            variables = {"eos_token": "", **self.tokenizer.special_tokens_map}
            self._finders[template] = LayoutFinder(self.whose, sandbox, variables)
        layout = self._finders[template].find(conversation, form)
        self.took_default |= is_default
        return layout

    def beginnings(self, prompt: str) -> Iterator[tuple[list[int], list[int]]]:
        """How a conversation begins up to the user's text, and how with a system message of this text, in tokens.

        Several where the tokens at their end depend on the user's text. Raises: SkippedConversation as `find_layout`
        """
        user, heads = Message("user", "a", is_target=False), list[str]()
        for messages in ((user,), (Message("system", prompt, is_target=False), user)):
            conversation = Conversation("", messages, plain=False)
            form = next(forms(conversation, [message.content for message in messages]))
            layout = self.find_layout(conversation, form)
            texts = [form.texts[i].text for i in layout.texts[:-1]]
            heads.append("".join(chain.from_iterable(zip(layout.separators, [*texts, ""], strict=False))))
        for end in ("", " "):  # a space may belong to the text behind it
            if all(head.endswith(end) for head in heads):
                old, new = (self._ids_of_separator(head.removesuffix(end), True, False) for head in heads)
                yield old or [self.table.start_id], new or [self.table.start_id]
        if not getattr(self.tokenizer, "chat_template", None):  # two texts that are only concatenated
            yield [self.table.start_id], [self.table.start_id, *self._template_ids(f"{prompt}\n\n")]

    # Tokens

    def encode_contents(self, turns: list[_Turns], side: int) -> list[list[Span] | None]:
        """The contents of each conversation; None for one with a content that the tokenizer changes.

        side: of this template in `_Turns.layouts`
        """
        texts = [each.form.texts[i].text for each in turns for i in each.layouts[side].texts]
        encoded = iter(encode_texts(self.tokenizer, texts))
        found: list[list[Span] | None] = []
        for each in turns:
            layout = each.layouts[side]
            spans = [
                self._encode_content(
                    next(encoded), each.kind_of(text), each.form.texts[text].text, separator, starts, not i
                )
                for i, (text, separator, starts) in enumerate(
                    zip(layout.texts, layout.separators, layout.starts, strict=False)
                )
            ]
            unchanged = [span for span in spans if span is not None]
            found.append(unchanged if len(unchanged) == len(spans) else None)
        return found

    def _encode_content(
        self, ids: Ids | None, kind: int, text: str, separator: str, starts: Sequence[int], first: bool
    ) -> Span | None:
        dummy = None if ids is None else self.table.dummy_bytes(ids, text)
        if ids is None or dummy is None:
            self.change = self.change or self.table.describe_change([] if ids is None else ids, text)
            return None
        if dummy and not separator.endswith(" ") and not self._puts_dummy_after(separator, first):
            for anchor in ANCHORS:
                own = encode_after(self.tokenizer, anchor, text)
                if own is not None:
                    return Span(own, kind)
        if not dummy and separator.endswith(" ") and len(separator) not in starts:
            joined = self._join_space(text)
            if joined is not None:
                return Span(joined, kind, has_dummy=True)
        return Span(ids, kind, bool(dummy))

    def _join_space(self, text: str) -> Ids | None:
        """Ids of a text with the template's space before it, where the first token holds both; else None."""
        (ids,) = encode_texts(self.tokenizer, [f" {text}"])
        if ids is None or not len(ids) or self.table.dummy_bytes(ids, f" {text}") != 0:
            return None
        first = self.table.pieces[ids[0]]
        return ids if first.startswith(b" ") and first.strip() else None

    def _puts_dummy_after(self, separator: str, first: bool) -> bool:
        """Would the tokenizer, given the whole rendered text, put a dummy space between a separator and a content?"""
        if not separator:
            return first
        if separator not in self._dummy_after:
            apart = self._template_ids(separator) + encode(self.tokenizer, ["a"])[0]
            self._dummy_after[separator] = self._template_ids(separator + "a") == apart
        return self._dummy_after[separator]

    def interleave(self, turns: _Turns, side: int, contents: list[Span]) -> list[Span]:
        """Template text, contents and stop tokens in order, behind a start token where the template does not begin."""
        layout, spans = turns.layouts[side], list[Span]()
        messages = [turns.form.texts[i].message for i in layout.texts]
        for i, (separator, starts) in enumerate(zip(layout.separators, layout.starts, strict=True)):
            is_last = i == len(contents)
            if not is_last and contents[i].has_dummy and separator.endswith(" "):
                separator = separator[:-1]  # the dummy space stands for it
            cuts = [0, *(min(start, len(separator)) for start in starts), len(separator)]
            in_answer = bool(i) and contents[i - 1].kind == RESPONSE
            begins_answer = not is_last and contents[i].kind == RESPONSE
            goes_on = in_answer and begins_answer and messages[i - 1] == messages[i]
            for k, (low, high) in enumerate(pairwise(cuts)):
                ends_separator = k == len(starts)
                ids = self._ids_of_separator(separator[low:high], not i and not k, is_last and ends_separator)
                if k:
                    in_answer, goes_on = True, begins_answer
                if not in_answer:
                    spans.append(Span(ids, TEMPLATE))
                elif goes_on and ends_separator:
                    spans.append(Span(ids, FORMAT))
                else:
                    end = next((end for end in layout.ends[i] if low < end <= high), None)
                    spans += self._stop_spans(ids, None if end is None else separator[low:end])
            spans += contents[i : i + 1]
        spans = [span for span in spans if len(span.ids) or span.kind in (PROMPT, RESPONSE)]
        return spans if spans[0].kind == TEMPLATE else [Span([self.table.start_id], TEMPLATE), *spans]

    def _stop_spans(self, ids: list[int], answer: str | None) -> list[Span]:
        """The template's text behind an answer: predicted up to the stop token, with what stands before that.

        answer: the part of it that belongs to the answer's message; None if that is not known
        """
        places = [i + 1 for i, token in enumerate(ids) if token in self._end_ids]
        num_stop = places[0] if places else 0
        if answer is not None:
            own = self._template_ids(answer.rstrip())
            # A template may end several parts of one message, of which the last is its end.
            num_ends = sum(token in self._end_ids for token in own)
            num_stop = places[min(num_ends, len(places)) - 1] if num_ends and places else 0
            if not num_stop and own and own == ids[: len(own)] and self.table.kinds[own[-1]] == SPECIAL:
                num_stop = len(own)
        stop = ids[:num_stop] if num_stop else [self.table.end_id]
        return [Span(stop, STOP), Span(ids[num_stop:], TEMPLATE)]

    def _ids_of_separator(self, text: str, first: bool, last: bool) -> list[int]:
        """Ids of a separator as it is cut between contents; first, last: nothing stands before it, or behind."""
        if (text, first, last) not in self._separator_ids:
            # A dummy space before what follows would take in the separator's own last space.
            before, after = "" if first else "a", "" if last or self.table.dummy_prefix else "a"
            self._separator_ids[text, first, last] = next(
                ids
                for context in ((before, after), (before, ""), ("", ""))
                if (ids := self._ids_between(text, *context)) is not None
            )
        return self._separator_ids[text, first, last]

    def _ids_between(self, text: str, before: str, after: str) -> list[int] | None:
        """Ids of a separator between these texts; None if a token spans it and one of them."""
        prefix, whole, suffix = map(self._template_ids, (before, before + text + after, after))
        end = len(whole) - len(suffix)
        fits = whole[: len(prefix)] == prefix and whole[end:] == suffix
        return whole[len(prefix) : end] if fits else None

    def _template_ids(self, text: str) -> list[int]:
        """Ids of a template's text, special tokens recognised."""
        return called_ids(self.tokenizer, text, add_special_tokens=False)


def chat_prompt_ids(tokenizer, prompt: str, date: str = "") -> list[int]:
    """Ids of a user's message and the generation prompt behind it, in the tokenizer's chat template.

    date: that the template may write, in ISO format; '' for today
    Raises: ValueError with the reason if the template fails, or does not end
    """
    template = tokenizer.chat_template
    template = template["default"] if isinstance(template, dict) else template
    try:
        text = TemplateSandbox(template, datetime.fromisoformat(date) if date else datetime.now()).render(
            [{"role": "user", "content": prompt}],
            tools=None, documents=None, add_generation_prompt=True, **tokenizer.special_tokens_map,
        )  # fmt: skip
    except TooMuchWork as error:
        raise ValueError(str(error)) from None
    return called_ids(tokenizer, text, add_special_tokens=False)


def truncate_conversation(
    whole: list[list[Span]], tables: list[TokenTable], limits: tuple[int, int]
) -> list[list[Span]] | None:
    """A conversation in each side's tokens, cut at the last place within the limits where both end a token.

    None if no target is left
    """
    if num_tokens(whole[0]) <= limits[0] and num_tokens(whole[-1]) <= limits[1]:
        return whole
    ends = [concatenate_spans([spans], table)[0].ends for spans, table in zip(whole, tables, strict=True)]
    block = next(pack_streams(ends[0], ends[-1], *limits), None)
    if block is None or block.student_start or block.teacher_start:  # it begins with a passage that exceeds a block
        return None
    kept = [
        _first_tokens(spans, end) for spans, end in zip(whole, (block.student_end, block.teacher_end), strict=False)
    ]
    return kept if all(any(span.kind in (RESPONSE, STOP) for span in spans) for spans in kept) else None


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
