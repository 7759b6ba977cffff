"""Conversations as each model writes them: which tokens are content, which are glue, and which are to be learned.

Each model has a chat template of its own. The contents are the same text for both and stay text, whatever they look
like; what a template puts around them is glue, in which special tokens are recognised. Both are encoded separately,
so that a content is known to the byte. Where that boundary would merge nothing, and that is what templates are made
for, the tokens are those of the template itself.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from jinja2 import TemplateError

from sar_kd.data.samples import Conversation
from sar_kd.errors import UsageError
from sar_kd.tokenization.backends import encode
from sar_kd.tokenization.long_text import ANCHORS, encode_behind, encode_texts
from sar_kd.tokenization.token_stream import PROMPT, RESPONSE, STOP, TEMPLATE, Part
from sar_kd.tokenization.token_table import Ids, TokenTable, build_token_table
from sar_kd.tokenization.tokenizer_pair import TokenizerPair

DEFAULT_TEMPLATE = (
    "{% for message in messages %}{{ message.role | capitalize + ':\\n' + message.content }}"
    "{% if not loop.last %}{{ '\\n\\n' }}{% endif %}{% endfor %}"
)
"""For a model without a chat template. A content follows a line end: a space would belong to its first word."""

_SENTINEL = re.compile("\ue000([0-9]+)\ue001")


class Rendered(NamedTuple):
    """Conversations in both models' tokens."""

    names: list[str]
    sides: list[list[list[Part]]]
    """The student's parts of each conversation, and the teacher's where the tokenizers differ."""
    tables: list[TokenTable]
    """The table of each side."""
    left_out: list[str]
    """Names of those that a chat template or a tokenizer refuses, each with the reason."""
    without_template: tuple[str, ...]
    """'student', 'teacher': which of them took `DEFAULT_TEMPLATE`."""


class _Draft(NamedTuple):
    """A conversation of which both models read `texts`, each with its own glue around them."""

    conversation: Conversation
    texts: list[str]
    frames: list[list[str]]
    """By side, the glue before each text and behind the last."""


class _Content(NamedTuple):
    """A text in a model's tokens."""

    ids: Ids
    has_dummy: bool
    """It begins with a space that the tokenizer put there"""


class _Refused(ValueError):
    """What is wrong with a conversation, for one model."""


def render(conversations: list[Conversation], pair: TokenizerPair, writers: list[_Writer] | None = None) -> Rendered:
    """Write every conversation as each model writes it.

    writers: `writers_of(pair)`, where the conversations come in several lots; `without_template` is of all of them
    Raises: UsageError if the tokenizers are taken as equal and do not write alike, or their bytes cannot be known
    """
    writers = writers or writers_of(pair)
    drafts, names, left_out = [], [], []
    for conversation in conversations:
        try:
            drafts.append(_draft(conversation, writers))
        except _Refused as refusal:
            left_out.append(f"{conversation.name} ({refusal})")
    sides: list[list[list[Part]]] = [[] for _ in writers]
    found = [writer.contents(drafts, side) for side, writer in enumerate(writers)]
    for draft, *contents in zip(drafts, *found, strict=True):
        lacking = [writer for writer, content in zip(writers, contents, strict=True) if content is None]
        if lacking:
            left_out.append(f"{draft.conversation.name} (the {lacking[0].whose}'s tokenizer cannot represent it)")
            continue
        names.append(draft.conversation.name)
        is_text = [all(content.has_dummy for content in same) for same in zip(*contents, strict=True)]
        for side, writer in enumerate(writers):
            sides[side].append(writer.parts(draft, draft.frames[side], contents[side], is_text))
    without = tuple(writer.whose for writer in writers if writer.took_default)
    if without and len(writers) == 1:
        without = "student", "teacher"
    return Rendered(names, sides, [writer.table for writer in writers], left_out, without)


def writers_of(pair: TokenizerPair) -> list[_Writer]:
    """One writer for each stream of tokens: a single one where the tokenizers are taken as equal."""
    if pair.is_exact:
        student, teacher = pair.exact_tables
        return [_Writer("student", pair.student, student), _Writer("teacher", pair.teacher, teacher)]
    if pair.tables is not None:
        raise UsageError("--alignment uld: a tokenizer that changes text reads plain text only, no conversations")
    if _template_of(pair.student) != _template_of(pair.teacher):
        raise UsageError(
            "--alignment auto: the tokenizers are equal and their chat templates differ, so that the models read a "
            "conversation in different tokens; use --alignment projection"
        )
    try:
        return [_Writer("student", pair.student, build_token_table(pair.student, len(pair.student)))]
    except ValueError as error:
        raise UsageError(f"--student_model: conversations need exact tokens, and its tokenizer {error}") from None


def _template_of(tokenizer) -> str | None:
    template = getattr(tokenizer, "chat_template", None)
    return template.get("default") if isinstance(template, dict) else template


def _draft(conversation: Conversation, writers: list[_Writer]) -> _Draft:
    """The texts that both models read: as given or, where a template strips them, stripped for both."""
    texts = [message.content for message in conversation.messages]
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can write and no encoding can
        raise _Refused("is no Unicode text") from None
    for writer in writers:
        texts = [writer.table.canonical(text) for text in texts]
    try:
        return _Draft(conversation, texts, [writer.frame(conversation, texts) for writer in writers])
    except _Refused:
        texts = [text.strip() for text in texts]
        return _Draft(conversation, texts, [writer.frame(conversation, texts) for writer in writers])


class _Writer:
    """How one model writes conversations."""

    def __init__(self, whose: str, tokenizer, table: TokenTable):
        self.whose, self.tokenizer, self.table = whose, tokenizer, table
        self.took_default = False
        self._template = _template_of(tokenizer)
        self._end_ids = frozenset(table.end_ids)
        self._frames: dict[tuple[str, ...], list[str]] = {}
        self._glue_ids: dict[tuple[str, bool, bool], list[int]] = {}
        self._spaced: dict[str, bool] = {}

    # Text

    def frame(self, conversation: Conversation, texts: list[str]) -> list[str]:
        """The glue before each of `texts`, the contents of `conversation`, and behind the last.

        Raises: _Refused if the template takes no such conversation or does not write the texts as they are
        """
        if self._template is None and conversation.plain:
            return [""] * (len(texts) + 1)
        roles = tuple(message.role for message in conversation.messages)
        if roles not in self._frames:
            self._frames[roles] = self._cut(roles)
        frame = self._frames[roles]
        if self._written(roles, texts) != frame[0] + "".join(map("".join, zip(texts, frame[1:], strict=True))):
            raise _Refused(f"the {self.whose}'s chat template changes the text of a message")
        self.took_default |= self._template is None
        return frame

    def _cut(self, roles: tuple[str, ...]) -> list[str]:
        """The template's own text, cut where the contents stand; what they say is left open by a sentinel each."""
        written = self._written(roles, [f"\ue000{i}\ue001" for i in range(len(roles))])
        pieces = _SENTINEL.split(written)
        found = [int(number) for number in pieces[1::2]]
        if found != list(range(len(roles))):
            fault = "repeats" if len(set(found)) < len(found) else "drops" if len(found) < len(roles) else "reorders"
            raise _Refused(f"the {self.whose}'s chat template {fault} messages ({', '.join(roles)})")
        return pieces[::2]

    def _written(self, roles: tuple[str, ...], contents: list[str]) -> str:
        messages = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=True)]
        template = self._template or DEFAULT_TEMPLATE
        try:
            return self.tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise _Refused(f"the {self.whose}'s chat template refuses it: {reason}") from None

    # Tokens

    def contents(self, drafts: list[_Draft], side: int) -> list[list[_Content] | None]:
        """Each text of each draft; None for a draft with one that the tokenizer cannot represent.

        side: which of the drafts' frames is its own
        """
        encoded = iter(encode_texts(self.tokenizer, [text for draft in drafts for text in draft.texts]))
        found: list[list[_Content] | None] = []
        for draft in drafts:
            glues = draft.frames[side]
            contents = [self._content(next(encoded), text, glues[i], not i) for i, text in enumerate(draft.texts)]
            whole = [content for content in contents if content is not None]
            found.append(whole if len(whole) == len(contents) else None)
        return found

    def _content(self, ids: Ids | None, text: str, glue: str, first: bool) -> _Content | None:
        if ids is None:
            return None
        num_bytes = len(text.encode())
        before = int(self.table.lengths[ids].sum()) - num_bytes
        if before not in (0, int(self.table.dummy_prefix)):
            return None
        if before and not glue.endswith(" ") and not self._puts_space(glue, first):
            for anchor in ANCHORS:
                behind = encode_behind(self.tokenizer, anchor, text)
                if behind is not None:
                    return _Content(behind, False)
        return _Content(ids, bool(before))

    def _puts_space(self, glue: str, first: bool) -> bool:
        """Whether the tokenizer, given the whole text, would put a space between this glue and a content."""
        if not glue:
            return first
        if glue not in self._spaced:
            self._spaced[glue] = self._own_ids(glue + "a") == self._own_ids(glue) + encode(self.tokenizer, ["a"])[0]
        return self._spaced[glue]

    def parts(self, draft: _Draft, frame: list[str], contents: list[_Content], is_text: list[bool]) -> list[Part]:
        """Glue, contents and stop tokens in order; `is_text`: whether each content's dummy space is text to both."""
        parts, messages = [], draft.conversation.messages
        for place, glue in enumerate(frame):
            if place < len(contents) and contents[place].has_dummy and glue.endswith(" "):
                glue = glue[:-1]  # the dummy space stands for it
            ids = self._glue(glue, not place, place == len(contents))
            if place and messages[place - 1].is_target:
                stop = self._stop(glue, ids)
                parts.append(Part(ids[:stop] if stop else [self.table.end_id], STOP))
                ids = ids[stop:]
            if ids:
                parts.append(Part(ids, TEMPLATE))
            if place < len(contents):
                kind = RESPONSE if messages[place].is_target else PROMPT
                parts.append(Part(contents[place].ids, kind, contents[place].has_dummy, is_text[place]))
        return parts

    def _stop(self, glue: str, ids: list[int]) -> int:
        """How many tokens of the glue behind a response the model has to write to stop; 0 if they do not stop it."""
        at = next((i for i, token in enumerate(ids) if token in self._end_ids), None)
        if at is None:
            return 0
        # White space before the stop token, as Llama 2's template has it, would else be what the model never learns.
        return 0 if glue.partition(self.table.strings[ids[at]])[0].strip() else at + 1

    def _glue(self, glue: str, first: bool, last: bool) -> list[int]:
        """Ids of a piece of glue as it is cut between other text.

        first: it opens the block, which has a start token already; last: nothing follows
        """
        if (glue, first, last) not in self._glue_ids:
            # A dummy space before what follows would take in the glue's own last space.
            before, after = "" if first else "a", "" if last or self.table.dummy_prefix else "a"
            ids = next(
                ids
                for sides in ((before, after), (before, ""), ("", ""))
                if (ids := self._between(glue, *sides)) is not None
            )
            self._glue_ids[glue, first, last] = ids[1:] if first and ids[:1] == [self.table.start_id] else ids
        return self._glue_ids[glue, first, last]

    def _between(self, glue: str, before: str, after: str) -> list[int] | None:
        """Ids of a piece of glue between these texts; None if it shares a token with one of them."""
        opening, whole, closing = map(self._own_ids, (before, before + glue + after, after))
        end = len(whole) - len(closing)
        fits = whole[: len(opening)] == opening and whole[end:] == closing
        return whole[len(opening) : end] if fits else None

    def _own_ids(self, text: str) -> list[int]:
        """Ids of a template's text, special tokens recognised."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]
