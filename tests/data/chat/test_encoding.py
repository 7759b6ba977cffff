"""Conversations: read from lines, rendered by each model's own chat template, targets in their responses only."""

import copy
import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sar_kd.config.sections import DataConfig
from sar_kd.data.batch import IGNORE_INDEX
from sar_kd.data.chat.encoding import chat_templates, render
from sar_kd.data.dataset import build_dataset
from sar_kd.data.files.samples import Conversation, Document, Message
from sar_kd.data.files.sources import load_documents
from sar_kd.data.skipped import skipped_lines
from sar_kd.data.tokenized_text import tokenize
from sar_kd.errors import UsageError
from sar_kd.evaluation.perplexity import evaluate
from sar_kd.runtime.precision import Precision
from sar_kd.tokenization.backends import encode
from sar_kd.tokenization.token_stream import PROMPT, RESPONSE, STOP, TEMPLATE
from sar_kd.tokenization.token_table import build_token_table
from sar_kd.tokenization.tokenizer_pair import TokenizerPair
from sar_kd.training.callbacks import check_targets

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3 = (
    "{% for m in messages %}{{ bos_token if loop.first }}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' }}"
    "{{ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}"
    "{% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}"
    "{% else %}{% set turns = messages %}{% set system = '' %}{% endif %}"
    "{% for m in turns %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{% set content = system + m['content'] if loop.first else m['content'] %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\\n'"
    " + m['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + eos_token + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
DIALOGPT = "{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"
TURNS = (
    "{% for m in messages %}{{ '<turn>' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<turn>{% endif %}"
)
COLONS = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}"
    "{{ eos_token + 'and then ' if m['role'] == 'assistant' else 'nd so ' }}{% endfor %}"
)
STYLES = {
    "chatml": ("byte_tokenizer", ["<|im_start|>", "<|im_end|>"], CHATML, "<|im_end|>"),
    "llama3": ("byte_tokenizer", ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], LLAMA3, "<|eot_id|>"),
    "gemma": ("sp_tokenizer", ["<start_of_turn>", "<end_of_turn>"], GEMMA, "<end_of_turn>"),
    "llama2": ("dummy_prefix_tokenizer", [], LLAMA2, "</s>"),
    "llama2b": ("dummy_prefix_tokenizer", ["<pad>"], LLAMA2, "</s>"),
    "zephyr": ("dummy_prefix_tokenizer", [], ZEPHYR, "</s>"),
    "dialogpt": ("byte_tokenizer", [], DIALOGPT, "<|endoftext|>"),
    "turns": ("dummy_prefix_tokenizer", ["<turn>"], TURNS, "</s>"),
    "colons": ("byte_tokenizer", [], COLONS, "<|endoftext|>"),
    "none": ("sp_tokenizer", [], None, "</s>"),
    "none2": ("dummy_prefix_tokenizer", [], None, "</s>"),
}
CROSS = [
    ("gemma", "chatml"), ("chatml", "gemma"), ("llama2", "chatml"), ("llama3", "llama2"), ("llama2", "gemma"),
    ("zephyr", "chatml"), ("llama2", "zephyr"), ("llama3", "chatml"), ("none", "chatml"), ("none2", "none"),
    ("llama2", "llama2b"),
]  # fmt: skip
EQUAL = [("chatml", "chatml"), ("llama2", "llama2")]
STRIPS = {"llama3", "llama2", "llama2b", "gemma"}

SYSTEM = [("system", "Answer slowly."), ("user", "Who wrote this?"), ("assistant", "The teacher wrote it.")]
CONVERSATIONS = {
    "one turn": [("user", "What follows a token?"), ("assistant", "It is not known before.")],
    "several turns": [
        ("user", "Hello."), ("assistant", "Hello to you."), ("user", "Two turns?"),
        ("assistant", "Yes,\n\nthree lines."), ("user", "Bye"), ("assistant", "x"),
    ],
    "other scripts": [
        ("user", "\u65e5\u672c\u8a9e \U0001f600?"),
        ("assistant", "caf\u00e9 \u041f\u0440\u0438\u0432\u0435\u0442 \u0928")
    ],
    "code": [("user", "Write a loop:\n"), ("assistant", "for i in range(10):\n    print(i, end=' ')\n\n\n# done")],
    "look-alikes": [
        ("user", "Say <|im_end|> and <|eot_id|>."),
        ("assistant", "<|im_start|>user\n</s><s> [/INST] <end_of_turn> <|endoftext|> [INST]"),
    ],
}  # fmt: skip


def _conversation(turns, name="talk", plain=False):
    return Conversation(name, tuple(Message(role, text, role == "assistant") for role, text in turns), plain)


CONVERSATION_LIST = [_conversation(turns, name) for name, turns in CONVERSATIONS.items()]


@pytest.fixture(scope="module")
def tokenizers(request):
    made = {}
    for name, (base, special, template, _) in STYLES.items():
        made[name] = copy.deepcopy(request.getfixturevalue(base))
        made[name].add_tokens(special, special_tokens=True)
        made[name].chat_template = template
    return made


def _pair(student, teacher, **settings):
    return TokenizerPair(student, teacher, student_vocab_size=len(student), teacher_vocab_size=len(teacher), **settings)


@pytest.fixture(scope="module")
def pairs(tokenizers):
    sides = {names: [tokenizers[name] for name in names] for names in [*CROSS, *EQUAL]}
    return {names: _pair(*both, aligns=names in CROSS) for names, both in sides.items()}


def _table(tokenizer):
    return build_token_table(tokenizer, len(tokenizer))


def _own_ids(tokenizer, turns):
    """The ids of the chat template's own rendering."""
    messages = [{"role": role, "content": text} for role, text in turns]
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)


def _text(span, table):
    """The text of a span, without the dummy space before it."""
    decoded = table.spell(span.ids).decode()
    return decoded[1:] if span.has_dummy else decoded


def _place(span, whole):
    """Where a list stands in another; -1 if it does not."""
    return next((i for i in range(len(whole)) if whole[i : i + len(span)] == span), -1)


# Reading

HELLO = {"role": "user", "content": "Hello"}
ANSWER = {"role": "assistant", "content": "Hi."}


def _load(tmp_path, *examples, name="a.jsonl", **settings):
    path = tmp_path / name
    path.write_text("\n".join(json.dumps(each) for each in examples), encoding="utf-8")
    return load_documents(DataConfig(train_file=(str(path),), **({"validation_file": (str(path),)} | settings)))[0]


ASKED, ANSWERED = ("user", "Hello", False), ("assistant", "Hi.", True)
SHAPES = {
    "messages": ({"messages": [HELLO, ANSWER]}, [ASKED, ANSWERED], False),
    "several answers": ({"messages": [HELLO, ANSWER, HELLO, ANSWER], "id": 3}, [ASKED, ANSWERED] * 2, False),
    "a last word of the user": ({"messages": [HELLO, ANSWER, HELLO]}, [ASKED, ANSWERED], False),
    "two texts": ({"prompt": "1 +", "completion": " 2"}, [("user", "1 +", False), ("assistant", " 2", True)], True),
    "a question": ({"question": "Hello", "answer": "Hi."}, [ASKED, ANSWERED], True),
    "two lists": (
        {"prompt": [HELLO, ANSWER, HELLO], "completion": [ANSWER]},
        [ASKED, ("assistant", "Hi.", False), ASKED, ANSWERED],
        False,
    ),
    "a list and a text": ({"prompt": [HELLO], "completion": "Hi."}, [ASKED, ANSWERED], False),
    "an empty prompt": ({"prompt": "", "completion": "Hi."}, [("user", "", False), ANSWERED], True),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_a_line_in_each_shape_becomes_a_conversation(tmp_path, shape):
    example, messages, plain = SHAPES[shape]
    wanted = tuple(Message(*message) for message in messages)
    assert _load(tmp_path, example) == [Conversation("a.jsonl:1", wanted, plain)]


def test_documents_and_conversations_may_share_a_file(tmp_path):
    examples = [{"text": "plain"}, {"messages": [HELLO, ANSWER]}, {"prompt": "a", "completion": "b"}, {"text": "more"}]
    kinds = [type(sample) for sample in _load(tmp_path, *examples)]
    assert kinds == [Document, Conversation, Conversation, Document]


def test_the_text_field_wins(tmp_path):
    example = {"text": "plain", "messages": [HELLO, ANSWER], "prompt": "a", "completion": "b"}
    assert _load(tmp_path, example) == [Document("a.jsonl:1", "plain")]
    assert _load(tmp_path, example, text_field="prompt") == [Document("a.jsonl:1", "a")]
    assert isinstance(_load(tmp_path, example, text_field="body")[0], Conversation)


BAD_EXAMPLES = {
    "no field": ({"body": "x"}, r"line 2 has no text and no conversation.*it has: body.*--text_field"),
    "messages in one text": ({"messages": "Hello"}, "line 2: 'messages' is text; expected a list of messages"),
    "no list": ({"messages": {}}, "line 2: 'messages' is an object; expected a list of messages"),
    "a bare text": ({"messages": ["Hello"]}, "line 2: message 1 of 'messages' is text; expected {{'role'"),
    "no role": ({"messages": [HELLO, {"content": "x"}]}, "line 2: message 2 of 'messages' has no 'role'; expected"),
    "no content": ({"messages": [{"role": "user"}]}, "line 2: message 1 of 'messages' has no 'content'; expected"),
    "content in parts": (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        "line 2: message 1 of 'messages' has a list as 'content'; expected",
    ),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image"}]}]},
        "line 2: message 1 of 'messages' holds a part of type 'image'; only text is learned: leave such examples out",
    ),
    "role a number": ({"messages": [{"role": 1, "content": "x"}]}, "message 1 of 'messages' has a number as 'role'"),
    "no completion": ({"prompt": "a"}, "line 2 has no 'completion'; expected 'prompt' with 'completion'"),
    "no question": ({"answer": "a"}, "line 2 has no 'question'; expected 'question' with 'answer'"),
    "completion a number": ({"prompt": "a", "completion": 4}, "'completion' is a number; expected text or a list of m"),
}  # fmt: skip


NO_ANSWER = {
    "no assistant": ({"messages": [HELLO, HELLO]}, "messages"),
    "an empty answer": ({"messages": [HELLO, {"role": "assistant", "content": " "}]}, "messages"),
    "no messages": ({"messages": []}, "messages"),
    "empty completion": ({"prompt": "a", "completion": " "}, "completion"),
    "a user's completion": ({"prompt": "a", "completion": [HELLO]}, "completion"),
}


@pytest.mark.parametrize("case", NO_ANSWER)
def test_an_example_without_an_answer_is_left_out_and_counted(tmp_path, byte_tokenizer, case):
    example, field = NO_ANSWER[case]
    path = tmp_path / "some.jsonl"
    path.write_text("\n".join(json.dumps(each) for each in (SHAPES["messages"][0], example)))
    documents, _ = load_documents(DataConfig(train_file=(str(path),), validation_file=(str(path),)))
    train = build_dataset(documents, _pair(byte_tokenizer, byte_tokenizer), 64, 64)
    assert list(train.text.names) == ["some.jsonl:1"]
    (line,) = skipped_lines(train.text)
    assert line.startswith(f"Skipped 1 document, its '{field}' holds nothing to learn: some.jsonl:2")
    assert check_targets(train, DataConfig()) == []


@pytest.mark.parametrize("case", BAD_EXAMPLES)
@pytest.mark.parametrize("flag", ["train_file", "validation_file"])
def test_a_line_of_a_bad_shape_is_named_with_what_was_expected(tmp_path, case, flag):
    example, message = BAD_EXAMPLES[case]
    (tmp_path / "good.jsonl").write_text(json.dumps(SHAPES["messages"][0]))
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join(json.dumps(each) for each in ({"text": "fine"}, example)))
    files = {"train_file": (str(tmp_path / "good.jsonl"),), flag: (str(path),)}
    begins = "" if message.startswith("--") else f"^--{flag} {path}: .*"
    with pytest.raises(UsageError, match=begins + message.format(path=path)) as error:
        load_documents(DataConfig(**files))
    assert "\n" not in str(error.value)


NULLS = {
    "a line": (None, "is null"),
    "the text": ({"text": None}, "its 'text' is null"),
    "messages": ({"messages": None}, "its 'messages' is null"),
    "a message": ({"messages": [HELLO, None]}, "message 2 of its 'messages' is null"),
    "a content": (
        {"messages": [HELLO, {"role": "assistant", "content": None}]},
        "message 2 of its 'messages' has null as 'content'",
    ),
    "a role": ({"messages": [{"role": None, "content": "x"}]}, "message 1 of its 'messages' has null as 'role'"),
    "a completion": ({"prompt": "a", "completion": None}, "its 'completion' is null"),
}  # fmt: skip


@pytest.mark.parametrize("case", NULLS)
def test_an_example_with_a_null_is_skipped_by_name_and_does_not_end_the_run(tmp_path, tokenizers, case):
    example, fault = NULLS[case]
    samples = _load(tmp_path, SHAPES["messages"][0], example, SHAPES["messages"][0])
    text = tokenize(samples, _pair(tokenizers["chatml"], tokenizers["chatml"]))
    assert list(text.names) == ["a.jsonl:1", "a.jsonl:3"]
    assert list(text.skipped_documents) == [f"a.jsonl:2 ({fault})"]


def test_content_in_text_parts_is_joined_and_other_fields_are_kept(tmp_path):
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    call = {"function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        {"role": "user", "content": parts, "name": None},
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "Use it."},
        {"role": "tool", "content": "2", "tool_call_id": "7"},
        ANSWER,
    ]
    tools = [{"name": "add", "parameters": {}}]
    (found,) = _load(tmp_path, {"messages": messages, "tools": tools})
    assert [message.content for message in found.messages] == ["Hello", "", "2", "Hi."]
    fields = [json.loads(message.fields or "{}") for message in found.messages]
    assert fields == [{}, {"tool_calls": [call], "reasoning_content": "Use it."}, {"tool_call_id": "7"}, {}]
    assert [message.is_target for message in found.messages] == [False, True, False, True]
    assert json.loads(found.tools) == tools
    for text in (json.dumps(tools), tools):  # some data sets hold JSON inside a text
        assert _load(tmp_path, {"messages": messages, "tools": text})[0] == found
    with pytest.raises(UsageError, match="'tools' is text; expected a list of functions"):
        _load(tmp_path, {"messages": messages, "tools": "add"})


class _Split(list):
    """Examples as the `datasets` package gives them."""

    @property
    def column_names(self):
        return list(self[0])

    def __getitem__(self, key):
        return [example[key] for example in self] if isinstance(key, str) else super().__getitem__(key)


@pytest.fixture
def serve(monkeypatch):
    def install(**splits):
        package = SimpleNamespace(load_dataset=lambda name, configuration: splits)
        monkeypatch.setitem(sys.modules, "datasets", package)

    return install


def test_examples_of_a_dataset_become_conversations(serve):
    examples = _Split([{"question": "Why?", "answer": "So."}, {"question": "How?", "answer": "Thus."}])
    serve(train=examples, validation=_Split([{"messages": [HELLO, ANSWER]}]))
    train, validation = load_documents(DataConfig(dataset_name="x"))
    assert train == [
        _conversation([("user", "Why?"), ("assistant", "So.")], "train:0", plain=True),
        _conversation([("user", "How?"), ("assistant", "Thus.")], "train:1", plain=True),
    ]
    assert validation == [_conversation([("user", "Hello"), ("assistant", "Hi.")], "validation:0")]


def test_the_text_column_of_a_dataset_wins(serve):
    examples = _Split([{"text": "plain", "messages": [HELLO, ANSWER]}])
    serve(train=examples, validation=examples)
    assert load_documents(DataConfig(dataset_name="x")) == (
        [Document("train:0", "plain")],
        [Document("validation:0", "plain")],
    )


def test_a_bad_example_of_a_dataset_is_named(serve):
    serve(train=_Split([{"messages": [HELLO, ANSWER]}, {"messages": [{"role": "user"}]}]))
    with pytest.raises(UsageError, match="--dataset_name x: train example 1: message 1 of 'messages' has no 'content'"):
        load_documents(DataConfig(dataset_name="x"))


# Held-out conversations


@pytest.mark.parametrize("count", [2, 5, 60, 200])
def test_whole_conversations_are_held_out(tmp_path, count):
    examples = [
        {"messages": [HELLO | {"content": f"Number {n:03}?"}, ANSWER | {"content": "Yes. " * 9}]} for n in range(count)
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, examples)))
    everything = _load(tmp_path, *examples)
    train, validation = load_documents(DataConfig(train_file=(str(tmp_path / "a.jsonl"),)))
    assert train + validation == everything
    assert len(validation) == max(1, count // 20)


def test_a_document_before_held_out_conversations_stays_whole(tmp_path):
    examples = [{"text": "word " * 2000}, *[{"messages": [HELLO, ANSWER]}] * 3]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, examples)))
    _, validation = load_documents(DataConfig(train_file=(str(path),)))
    held_out = sum(len(sample.text) for sample in validation)
    assert [type(sample) for sample in validation[-3:]] == [Conversation] * 3
    assert 0.02 < held_out / (10_000 + 3 * len("HelloHi.")) < 0.12


def test_one_conversation_alone_is_not_split(tmp_path):
    with pytest.raises(UsageError, match=r"--validation_file: needed, because .* one conversation"):
        _load(tmp_path, SHAPES["messages"][0], validation_file=())


# Each model's own tokens


@pytest.mark.parametrize(
    ("name", "conversation"),
    [
        (name, conversation)
        for name in ("chatml", "llama3", "gemma", "llama2", "zephyr", "dialogpt", "turns")
        for conversation in ("one turn", "several turns", "other scripts", "code", "system")
        if (name, conversation) != ("gemma", "system")  # which it refuses
    ],
)
def test_a_conversation_has_the_tokens_of_its_rendered_template(tokenizers, name, conversation):
    tokenizer = tokenizers[name]
    turns = [
        (role, text.strip()) for role, text in (SYSTEM if conversation == "system" else CONVERSATIONS[conversation])
    ]
    stream = tokenize([_conversation(turns)], _pair(tokenizer, tokenizer)).student
    opening = [tokenizer.bos_token_id] if name == "dialogpt" else []  # a template that writes nothing before a content
    assert stream.ids.tolist() == opening + _own_ids(tokenizer, turns)


@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma", "dialogpt", "colons"])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_a_conversation_decodes_to_its_rendered_template(tokenizers, name, conversation):
    tokenizer, turns = tokenizers[name], [(role, text.strip()) for role, text in CONVERSATIONS[conversation]]
    messages = [{"role": role, "content": text} for role, text in turns]
    written = tokenizer.apply_chat_template(messages, tokenize=False)
    ids = tokenize([_conversation(turns)], _pair(tokenizer, tokenizer)).student.ids.tolist()
    opening = tokenizer.bos_token if turns[0][1] and name == "dialogpt" else ""
    assert tokenizer.decode(ids) == opening + written


def test_of_several_templates_the_default_one_is_taken(tokenizers):
    tokenizer = copy.deepcopy(tokenizers["chatml"])
    tokenizer.chat_template = {"tool_use": GEMMA, "default": CHATML}
    stream = tokenize([_conversation(SYSTEM)], _pair(tokenizer, tokenizer)).student
    assert stream.ids.tolist() == _own_ids(tokenizers["chatml"], SYSTEM)


@pytest.mark.parametrize("names", CROSS + EQUAL)
def test_contents_are_exactly_the_same_text_on_both_sides(pairs, names):
    rendered = render(CONVERSATION_LIST, chat_templates(pairs[names]))
    assert rendered.names == list(CONVERSATIONS)
    assert rendered.skipped_documents == []
    for side, table in zip(rendered.sides, rendered.tables, strict=True):
        for spans, conversation in zip(side, CONVERSATION_LIST, strict=True):
            texts = [m.content.strip() if STRIPS & {*names} else m.content for m in conversation.messages]
            kinds = [RESPONSE if m.is_target else PROMPT for m in conversation.messages]
            contents = [span for span in spans if span.kind in (PROMPT, RESPONSE)]
            assert [_text(span, table) for span in contents] == texts
            assert [span.kind for span in contents] == kinds


@pytest.mark.parametrize("names", CROSS + EQUAL)
def test_a_stop_token_follows_each_response_and_nothing_else(pairs, names):
    rendered = render(CONVERSATION_LIST, chat_templates(pairs[names]))
    for name, side, table in zip(names, rendered.sides, rendered.tables, strict=False):
        stop = STYLES[name][3]
        for spans, conversation in zip(side, CONVERSATION_LIST, strict=True):
            kinds = [span.kind for span in spans]
            assert [i + 1 for i, kind in enumerate(kinds) if kind == RESPONSE] == [
                i for i, kind in enumerate(kinds) if kind == STOP
            ]
            assert kinds.count(STOP) == sum(message.is_target for message in conversation.messages)
            assert {table.strings[span.ids[-1]] for span in spans if span.kind == STOP} == {stop}


def test_an_assistant_s_message_in_the_prompt_is_read_and_not_learned(pairs):
    turns = [("user", "a"), ("assistant", "for example"), ("user", "b"), ("assistant", "now")]
    example = [Message(role, text, role == "assistant" and text == "now") for role, text in turns]
    rendered = render(
        [Conversation("few shots", tuple(example), plain=False)], chat_templates(pairs["llama2", "chatml"])
    )
    for name, side, table in zip(("llama2", "chatml"), rendered.sides, rendered.tables, strict=True):
        found = [(span.kind, _text(span, table)) for span in side[0] if span.kind not in (TEMPLATE, STOP)]
        assert found == [(PROMPT, "a"), (PROMPT, "for example"), (PROMPT, "b"), (RESPONSE, "now")]
        assert [span.kind for span in side[0]].count(STOP) == 1
        behind = side[0][1 + [span.kind for span in side[0]].index(PROMPT, 2)]
        assert behind.kind == TEMPLATE
        assert table.strings.index(STYLES[name][3]) in behind.ids


@pytest.mark.parametrize("names", CROSS + EQUAL)
def test_text_that_looks_like_a_special_token_stays_text(pairs, names):
    rendered = render([_conversation(CONVERSATIONS["look-alikes"])], chat_templates(pairs[names]))
    for side, table in zip(rendered.sides, rendered.tables, strict=True):
        special = {i for i, string in enumerate(table.strings) if string and not table.pieces[i]}
        contents = {i for span in side[0] if span.kind in (PROMPT, RESPONSE) for i in span.ids}
        assert len(special) >= 3
        assert not contents & special


@pytest.mark.parametrize("opening", ["", " ", "\n", "\n\n\n", "aa"])
def test_without_a_space_before_it_a_content_has_no_dummy_space(tokenizers, opening):
    tokenizer = tokenizers["zephyr"]
    turns = [("user", opening + "What follows?"), ("assistant", opening + "The token.")]
    rendered = render([_conversation(turns)], chat_templates(_pair(tokenizer, tokenizer)))
    contents = [span for span in rendered.sides[0][0] if span.kind in (PROMPT, RESPONSE)]
    assert not any(span.has_dummy for span in contents)
    assert [_text(span, rendered.tables[0]) for span in contents] == [text for _, text in turns]


def test_the_space_before_a_content_is_the_dummy_space(tokenizers):
    tokenizer = tokenizers["llama2"]
    rendered = render([_conversation(CONVERSATIONS["one turn"])], chat_templates(_pair(tokenizer, tokenizer)))
    separators = [span for span in rendered.sides[0][0] if span.kind == TEMPLATE]
    contents = [span for span in rendered.sides[0][0] if span.kind in (PROMPT, RESPONSE)]
    assert all(span.has_dummy for span in contents)
    assert not any(_text(span, rendered.tables[0]).endswith(" ") for span in separators)


def test_the_space_before_llama_2_s_stop_token_is_learned_with_it(tokenizers):
    tokenizer = tokenizers["llama2"]
    rendered = render([_conversation(CONVERSATIONS["one turn"])], chat_templates(_pair(tokenizer, tokenizer)))
    stop = rendered.sides[0][0][-1]
    assert tokenizer.convert_ids_to_tokens(stop.ids) == ["\u2581", "</s>"]
    assert stop.kind == STOP


def test_a_template_without_a_stop_token_gets_the_end_of_text_token(tokenizers):
    tokenizer = copy.deepcopy(tokenizers["chatml"])
    tokenizer.chat_template = "{% for m in messages %}{{ '\\n### ' + m['role'] + '\\n' + m['content'] }}{% endfor %}"
    rendered = render([_conversation(CONVERSATIONS["several turns"])], chat_templates(_pair(tokenizer, tokenizer)))
    assert [span.ids for span in rendered.sides[0][0] if span.kind == STOP] == [[tokenizer.eos_token_id]] * 3


def test_what_the_template_writes_before_the_stop_token_is_learned_with_it(tokenizers):
    tokenizer = copy.deepcopy(tokenizers["chatml"])
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + ' (' + m['role'] + ')<|im_end|>' }}{% endfor %}"
    ((*_, stop),) = render(
        [_conversation(CONVERSATIONS["one turn"])], chat_templates(_pair(tokenizer, tokenizer))
    ).sides[0]
    assert stop.kind == STOP
    assert tokenizer.decode(stop.ids) == " (assistant)<|im_end|>"


def test_an_empty_message_keeps_the_template_text_around_it(tokenizers):
    for name in ("llama2", "chatml"):
        turns = [("user", ""), ("assistant", "x"), ("user", "y"), ("assistant", ""), ("user", "z"), ("assistant", "w")]
        stream = tokenize([_conversation(turns)], _pair(tokenizers[name], tokenizers[name])).student
        assert tokenizers[name].decode(stream.ids.tolist()) == tokenizers[name].decode(
            _own_ids(tokenizers[name], turns)
        )


# Without a chat template


def test_two_plain_texts_follow_one_another(tokenizers):
    for name in ("none", "none2"):
        tokenizer = tokenizers[name]
        conversation = _conversation([("user", "Two tokenizers cut"), ("assistant", " the same text")], plain=True)
        text = tokenize([conversation], _pair(tokenizer, tokenizer))
        assert text.without_template == ()
        assert tokenizer.decode(text.student.ids[1:-1].tolist()) == "Two tokenizers cut the same text"
        assert text.student.ids[[0, -1]].tolist() == [tokenizer.bos_token_id, tokenizer.eos_token_id]


def test_a_completion_without_a_space_gets_none(tokenizers):
    tokenizer = tokenizers["none2"]
    text = tokenize([_conversation([("user", "1969"), ("assistant", "12.5")], plain=True)], _pair(tokenizer, tokenizer))
    assert tokenizer.decode(text.student.ids[1:-1].tolist()) == "196912.5"


def test_two_plain_texts_are_turns_to_a_model_with_a_template(pairs, tokenizers):
    turns = [("user", "Two tokenizers cut"), ("assistant", " the same text")]
    text = tokenize([_conversation(turns, plain=True)], pairs["none", "chatml"])
    assert text.teacher.ids.tolist() == _own_ids(tokenizers["chatml"], turns)
    assert tokenizers["none"].decode(text.student.ids[1:-1].tolist()) == "Two tokenizers cut the same text"


def test_messages_take_a_neutral_template_and_the_text_says_for_which_model(pairs, tokenizers):
    text = tokenize([_conversation(SYSTEM + CONVERSATIONS["one turn"])], pairs["none", "chatml"])
    assert text.without_template == ("student",)
    shown = [i for i in text.student.ids.tolist() if i != tokenizers["none"].eos_token_id]
    assert tokenizers["none"].decode(shown) == (
        "<s>System:\nAnswer slowly.\n\nUser:\nWho wrote this?\n\nAssistant:\nThe teacher wrote it.\n\n"
        "User:\nWhat follows a token?\n\nAssistant:\nIt is not known before."
    )
    assert text.student.ids.tolist().count(tokenizers["none"].eos_token_id) == 2
    assert tokenize([_conversation(SYSTEM)], _pair(tokenizers["chatml"], tokenizers["none"])).without_template == (
        "teacher",
    )
    alone = _pair(tokenizers["none"], tokenizers["none"])
    assert tokenize([_conversation(SYSTEM)], alone).without_template == ("student", "teacher")
    assert tokenize([_conversation(SYSTEM)], pairs["llama2", "chatml"]).without_template == ()


# Templates that cannot be used

BROKEN = {
    "drops": "{{ messages[-1]['content'] }}",
    "repeats": "{% for m in messages %}{{ m['content'] }}{% endfor %}{{ messages[0]['content'] }}",
    "reorders": "{% for m in messages | reverse %}{{ m['content'] }}\n{% endfor %}",
    "refuses it: no such turns": "{{ raise_exception('no such turns') }}",
    "cannot be used: Expected an expression": "{% for m in %}",
    "refuses it: ": "{{ messages[0]['parts'][0]['text'] + 1 }}",
    "changes the text": "{% for m in messages %}{{ m['content'] | replace('e', 'u') }}{% endfor %}",
}


@pytest.mark.parametrize("fault", BROKEN)
@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_a_template_that_does_not_keep_the_messages_is_refused_with_the_reason(tokenizers, fault, whose):
    broken = copy.deepcopy(tokenizers["chatml"])
    broken.chat_template = BROKEN[fault].replace("\n", "\\n")
    sides = (broken, tokenizers["gemma"]) if whose == "student" else (tokenizers["gemma"], broken)
    with pytest.raises(UsageError, match=f"--train_file: 1 of .*the {whose}'s chat template {fault}.*: talk; change"):
        tokenize([_conversation(CONVERSATIONS["one turn"])], _pair(*sides))


def test_a_conversation_that_one_template_refuses_is_skipped_by_name(pairs):
    conversations = [_conversation(SYSTEM, "with"), _conversation(CONVERSATIONS["one turn"], "without")]
    dataset = build_dataset(conversations, pairs["gemma", "chatml"], 400, 400)
    assert dataset.text.names == ["without"]
    assert dataset.text.skipped_documents == [
        "with (the student's chat template refuses it: System role not supported)"
    ]


def test_a_text_that_a_template_strips_is_stripped_for_both(pairs):
    turns = [("user", "\n Hello \n"), ("assistant", "  Hi.  ")]
    for names, wanted in ((("gemma", "chatml"), ["Hello", "Hi."]), (("zephyr", "chatml"), ["\n Hello \n", "  Hi.  "])):
        rendered = render([_conversation(turns)], chat_templates(pairs[names]))
        for side, table in zip(rendered.sides, rendered.tables, strict=True):
            assert [_text(span, table) for span in side[0] if span.kind in (PROMPT, RESPONSE)] == wanted


def test_a_template_whose_own_text_depends_on_a_content_is_found(tokenizers):
    tokenizer = copy.deepcopy(tokenizers["chatml"])
    tokenizer.chat_template = CHATML.replace("m['content']", "(m['content'].split('</think>') | last)")
    conversations = [
        _conversation([("user", "a"), ("assistant", "<think>b</think>c")], "thinks"),
        _conversation(CONVERSATIONS["one turn"]),
    ]
    text = tokenize(conversations, _pair(tokenizer, tokenizer))
    assert text.names == ["talk"]
    assert text.skipped_documents == ["thinks (the student's chat template drops a part of the answer)"]


@pytest.mark.parametrize("bad", ["\ud800", "\u2581"])
@pytest.mark.parametrize("names", [("gemma", "chatml"), ("chatml", "chatml")])
def test_text_that_is_hard_to_encode_is_canonical_or_skipped(pairs, names, bad):
    conversations = [
        _conversation([("user", "a"), ("assistant", f"b{bad}c")], "bad"),
        _conversation(CONVERSATIONS["one turn"]),
    ]
    rendered = render(conversations, chat_templates(pairs[names]))
    if bad == "\ud800":
        assert rendered.skipped_documents == ["bad (is no Unicode text)"]
        return
    wanted = "b c" if "gemma" in names else "b\u2581c"
    for side, table in zip(rendered.sides, rendered.tables, strict=True):
        assert _text(next(span for span in side[0] if span.kind == RESPONSE), table) == wanted


def test_a_conversation_that_a_tokenizer_changes_is_skipped_by_name(tokenizers):
    lacking = copy.deepcopy(tokenizers["chatml"])
    pair = _pair(lacking, tokenizers["gemma"])
    table = pair.tables[0]
    table.pieces[encode(lacking, ["\u20ac"])[0][0]] = b"?!"  # as if the bytes were other ones
    table.__dict__.pop("lengths", None)
    conversations = [
        _conversation([("user", "a"), ("assistant", "\u20ac")], "bad"),
        _conversation(CONVERSATIONS["one turn"]),
    ]
    assert render(conversations, chat_templates(pair)).skipped_documents == [
        "bad (the student's tokenizer changes its text)"
    ]


def test_equal_tokenizers_with_different_templates_name_the_remedy(tokenizers):
    other = copy.deepcopy(tokenizers["chatml"])
    other.chat_template = None
    with pytest.raises(UsageError, match=r"--alignment auto: .*chat templates differ.*use --alignment projection"):
        tokenize([_conversation(CONVERSATIONS["one turn"])], _pair(tokenizers["chatml"], other))
    pair = _pair(tokenizers["chatml"], other, aligns=True)
    text = tokenize([_conversation(CONVERSATIONS["one turn"])], pair)
    assert text.student.ids.tolist() == _own_ids(tokenizers["chatml"], CONVERSATIONS["one turn"])
    assert text.teacher.ids.tolist() != text.student.ids.tolist()


# Streams and batches


@pytest.mark.parametrize("names", CROSS)
def test_template_text_has_no_bytes_and_stops_have_one_on_both_sides(pairs, names):
    rendered = render(CONVERSATION_LIST, chat_templates(pairs[names]))
    text = tokenize(CONVERSATION_LIST, pairs[names])
    for spans, table, stream in zip(rendered.sides, rendered.tables, (text.student, text.teacher), strict=True):
        widths, at = np.diff(stream.ends, prepend=0), 0
        for span in (span for conversation in spans for span in conversation):
            here = slice(at, at + len(span.ids))
            at = here.stop
            assert stream.ids[here].tolist() == span.ids
            assert stream.is_target[here].tolist() == [span.kind in (RESPONSE, STOP)] * len(span.ids)
            size = len(_text(span, table).encode()) + span.dummy_is_text
            assert widths[here].sum() == {TEMPLATE: 0, STOP: 1}.get(span.kind, size)
            alone = span.has_dummy and not span.dummy_is_text
            assert stream.has_dummy[here].tolist() == [alone, *[False] * (len(span.ids) - 1)]
        assert at == len(stream.ids)
    assert text.student.ends[-1] == text.teacher.ends[-1]


@pytest.mark.parametrize("names", CROSS + EQUAL)
def test_the_bytes_of_a_text_are_those_of_its_responses(pairs, names):
    text = tokenize([Document("d", "caf\u00e9"), *CONVERSATION_LIST], pairs[names])
    strip = str.strip if STRIPS & {*names} else str
    responses = [strip(m.content) for conversation in CONVERSATION_LIST for m in conversation.messages if m.is_target]
    assert text.num_bytes == len("caf\u00e9".encode()) + sum(len(response.encode()) for response in responses)


@pytest.mark.parametrize("names", CROSS + EQUAL)
def test_every_response_and_its_stop_token_is_predicted_once_and_nothing_else(pairs, names):
    rendered = render(CONVERSATION_LIST, chat_templates(pairs[names]))
    dataset = build_dataset(CONVERSATION_LIST, pairs[names], 400, 400)
    for which, side in zip(("student", "teacher"), (rendered.sides[0], rendered.sides[-1]), strict=True):
        wanted = [i for spans in side for span in spans if span.kind in (RESPONSE, STOP) for i in span.ids]
        batches = list(dataset.token_batches(which, 2))
        assert torch.cat([batch.targets for batch in batches]).tolist() == wanted
        labels = torch.cat([batch.labels.flatten() for batch in batches])
        assert labels[labels != IGNORE_INDEX].tolist() == wanted
        for batch in batches:
            read = batch.labels != IGNORE_INDEX
            assert torch.equal(batch.labels[read], batch.input_ids[read])
        if which == "student":
            assert dataset.num_tokens == len(wanted)


@pytest.mark.parametrize("names", CROSS + EQUAL)
def test_a_conversation_has_a_block_of_its_own(pairs, names):
    documents = [Document("first", "word " * 300), *CONVERSATION_LIST, Document("last", "word " * 300)]
    dataset = build_dataset(documents, pairs[names], 400, 400)
    named = [dataset.documents_of(block) for block in range(len(dataset))]
    assert named[-len(CONVERSATIONS) :] == [[name] for name in CONVERSATIONS]
    assert {name for names in named[: -len(CONVERSATIONS)] for name in names} == {"first", "last"}
    plain = build_dataset([documents[0], documents[-1]], pairs[names], 400, 400)
    assert dataset.blocks[: len(plain)] == plain.blocks
    for both in ("student", "teacher"):
        size = len(getattr(plain.text, both).ids)
        assert np.array_equal(getattr(dataset.text, both).ids[:size], getattr(plain.text, both).ids)
        assert np.array_equal(getattr(dataset.text, both).ends[:size], getattr(plain.text, both).ends)


# Conversations that exceed a block

LONG = [
    ("user", "How long?"),
    ("assistant", "Words, words, words; " * 20),
    ("user", "Again"),
    ("assistant", "word " * 9),
]


@pytest.mark.parametrize("names", CROSS + EQUAL)
@pytest.mark.parametrize("limits", [(60, 1000), (1000, 60), (90, 90)])
def test_a_long_conversation_is_cut_to_the_same_text_on_both_sides(pairs, names, limits):
    pair = pairs[names]
    whole, dataset = tokenize([_conversation(LONG)], pair), build_dataset([_conversation(LONG)], pair, *limits)
    ((student_start, student_end, teacher_start, teacher_end),) = dataset.blocks
    assert (student_start, teacher_start) == (1, 1)  # behind the token that the template begins with
    assert student_end <= limits[0]
    assert teacher_end <= limits[1]
    text = dataset.text
    for span, full in ((text.student, whole.student), (text.teacher, whole.teacher)):
        assert np.array_equal(span.ids, full.ids[: len(span.ids)])
        assert np.array_equal(span.is_target, full.is_target[: len(span.ids)])
    assert text.student.ends[-1] == text.teacher.ends[-1] == whole.student.ends[student_end - 1]
    assert text.truncated == ["talk"]
    assert text.dropped_tokens == whole.student.is_target.sum() - text.student.is_target.sum()
    stops = {STYLES[name][3] for name in names}
    assert not {pair.student.convert_ids_to_tokens(int(text.student.ids[-1]))} & stops
    if pair.tables is not None:
        # As late as both limits allow: one common boundary more would exceed one of them.
        common = np.intersect1d(whole.student.ends, whole.teacher.ends)
        following = common[common > text.student.ends[-1]][0]
        sizes = [np.searchsorted(full.ends, following) + 1 for full in (whole.student, whole.teacher)]
        assert sizes[0] > limits[0] or sizes[1] > limits[1]


@pytest.mark.parametrize("names", CROSS + EQUAL)
def test_the_bytes_of_a_cut_conversation_are_those_that_are_left(pairs, names):
    pair = pairs[names]
    for limit in range(30, 120, 7):
        conversation = _conversation([("user", "a"), ("assistant", "caf\u00e9 \u65e5\u672c " * 20)])
        text = build_dataset([conversation], pair, limit, 4 * limit).text
        table = _table(pair.student)
        decoded = table.spell(text.student.ids[text.student.is_target])
        response = conversation.messages[1].content.encode()
        assert response.startswith(decoded.removeprefix(b" "))
        assert text.num_bytes == len(decoded.removeprefix(b" "))


@pytest.mark.parametrize("names", CROSS + EQUAL)
def test_a_conversation_without_room_for_a_response_is_skipped_by_name(pairs, names):
    late = [("user", "Words, words, words; " * 20), ("assistant", "word")]
    for limits in ((60, 1000), (1000, 60), (3, 3)):
        conversations = [_conversation(late, "late"), Document("plain", "word word")]
        dataset = build_dataset(conversations, pairs[names], *limits)
        assert dataset.text.names == ["plain"]
        assert dataset.text.skipped_documents == ["late (no response begins within a block)"]
    message = "^--validation_file x: 1 of its 1 document cannot be used: no response .*: late; raise --block_size"
    with pytest.raises(UsageError, match=message):
        build_dataset([_conversation(late, "late")], pairs[names], 60, 60, option="--validation_file x")


def test_a_conversation_that_just_fits_is_whole(pairs):
    pair = pairs["gemma", "chatml"]
    whole = tokenize([_conversation(LONG)], pair)
    limits = [len(stream.ids) for stream in (whole.student, whole.teacher)]
    dataset = build_dataset([_conversation(LONG)], pair, *limits)
    assert dataset.text.truncated == []
    assert dataset.blocks == [(1, limits[0], 1, limits[1])]
    assert build_dataset([_conversation(LONG)], pair, limits[0] - 4, limits[1]).text.truncated == ["talk"]


# The comparison of two models


@pytest.mark.parametrize("names", CROSS)
def test_only_tokens_of_responses_are_compared_and_pairs_say_the_same(pairs, names):
    dataset = build_dataset([*CONVERSATION_LIST, _conversation(LONG, "long")], pairs[names], 90, 200)
    blocks = list(range(len(dataset)))
    batch = dataset.batch(blocks)
    a = batch.alignment
    student_table, teacher_table = dataset.pair.tables
    teacher_next = torch.nn.functional.pad(batch.teacher.labels[:, 1:], (0, 1), value=IGNORE_INDEX).flatten()
    teacher_tokens = teacher_next[a.teacher_positions]
    assert len(a.student_positions) > 30
    assert (teacher_tokens != IGNORE_INDEX).all()
    student_tokens = batch.student.targets[a.student_positions]
    student_ends, teacher_ends = set(student_table.end_ids), set(teacher_table.end_ids)
    stops = 0
    for token, other, strict in zip(student_tokens.tolist(), teacher_tokens.tolist(), a.strict.tolist(), strict=True):
        assert (token in student_ends) == (other in teacher_ends)
        stops += token in student_ends
        if strict:
            assert student_table.pieces[token] == teacher_table.pieces[other]
        else:
            mine, theirs = student_table.pieces[token], teacher_table.pieces[other]
            assert mine != theirs
    assert stops == sum(token in student_ends for token in batch.student.targets.tolist()) >= len(CONVERSATIONS)
    assert stops == sum(token in teacher_ends for token in batch.teacher.targets.tolist())
    for position, teacher_position in zip(
        batch.student.positions[a.student_positions].tolist(), a.teacher_positions.tolist(), strict=True
    ):
        assert position // batch.student.input_ids.shape[1] == teacher_position // batch.teacher.input_ids.shape[1]


@pytest.mark.parametrize("names", [names for names in CROSS if not {"llama2", "none2"} & {*names}])
def test_every_token_of_a_response_is_in_a_chunk_that_says_the_same(pairs, names):
    dataset = build_dataset(CONVERSATION_LIST, pairs[names], 400, 400)
    batch = dataset.batch(list(range(len(dataset))))
    texts = []
    for one, chunks, table in (
        (batch.student, batch.alignment.student_chunks, dataset.pair.tables[0]),
        (batch.teacher, batch.alignment.teacher_chunks, dataset.pair.tables[1]),
    ):
        ends = set(table.end_ids)
        pieces = [b"\xff" if i in ends else table.pieces[i] for i in one.targets.tolist()]
        assert chunks.min() == 0
        numbers = chunks.tolist()
        texts.append(
            [b"".join(p for p, c in zip(pieces, numbers, strict=True) if c == n) for n in sorted(set(numbers))]
        )
    assert texts[0] == texts[1]
    assert len(texts[0]) == batch.alignment.num_chunks


def test_equal_tokenizers_compare_every_token_of_the_responses(pairs):
    dataset = build_dataset(CONVERSATION_LIST, pairs["chatml", "chatml"], 400, 400)
    batch = dataset.batch([0, 2, 4])
    assert torch.equal(batch.alignment.teacher_positions, batch.student.positions)
    assert len(batch.student.positions) == int((batch.student.labels != IGNORE_INDEX).sum())


def test_each_model_reads_a_conversation_as_its_template_writes_it(pairs, tokenizers):
    """No end token before it, as before a document of a model without a start token."""
    for names in (("gemma", "chatml"), ("chatml", "chatml"), ("llama3", "chatml"), ("zephyr", "chatml")):
        pair = pairs[names] if names in pairs else _pair(*(tokenizers[name] for name in names))
        text = [Document("plain", "Two tokenizers cut."), *CONVERSATION_LIST[1:3]]
        dataset = build_dataset(text, pair, 400, 400)
        batch = dataset.batch(list(range(len(dataset))))
        for name, side in zip(names, (batch.student, batch.teacher), strict=True):
            assert side.input_ids[0, 0] == tokenizers[name].bos_token_id
            for row, conversation in enumerate(CONVERSATION_LIST[1:3], 1):
                own = _own_ids(tokenizers[name], [(m.role, m.content) for m in conversation.messages])
                assert side.input_ids[row, : len(own)].tolist() == own


# Evaluation


@pytest.mark.parametrize(("name", "batch_size"), [("chatml", 1), ("chatml", 3), ("llama3", 2)])
def test_perplexity_is_that_of_a_plain_loop_over_the_responses(tokenizers, make_student, name, batch_size):
    tokenizer = tokenizers[name]
    headers = {
        "chatml": ("<|im_start|>{}\n", "<|im_end|>", "\n"),
        "llama3": ("<|start_header_id|>{}<|end_header_id|>\n\n", "<|eot_id|>", ""),
    }
    header, stop, after = headers[name]
    conversations = [_conversation([(role, text.strip()) for role, text in turns]) for turns in CONVERSATIONS.values()]
    model = make_student(len(tokenizer), max_position_embeddings=512).eval()
    nats, count = 0.0, 0
    for conversation in conversations:
        ids = [tokenizer.bos_token_id] if name == "llama3" else []
        learned = [False] * len(ids)
        for message in conversation.messages:
            opening = tokenizer(header.format(message.role) + "a")["input_ids"][:-1]  # line ends as before a word
            content = encode(tokenizer, [message.content])[0] + tokenizer(stop)["input_ids"]
            closing = tokenizer(after)["input_ids"]
            ids += opening + content + closing
            learned += [False] * len(opening) + [message.role == "assistant"] * len(content) + [False] * len(closing)
        with torch.no_grad():
            log_probs = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        for position in range(1, len(ids)):
            if learned[position]:
                nats -= log_probs[position - 1, ids[position]].item()
                count += 1
    dataset = build_dataset(conversations, _pair(tokenizer, tokenizer), 400, 400)
    precision = Precision(torch.device("cpu"), torch.float32, 1.0)
    found = evaluate(model, dataset.token_batches("student", batch_size), dataset.text.num_bytes, precision)
    assert found.num_tokens == count == dataset.num_tokens
    assert found.perplexity == pytest.approx(math.exp(nats / count), rel=1e-5)
    size = sum(len(m.content.encode()) for conversation in conversations for m in conversation.messages if m.is_target)
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / size, rel=1e-5)
