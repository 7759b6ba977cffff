# ruff: noqa: E501 (templates have long lines)
"""Templates of the kinds that models have: what of a conversation they write, and what of an answer is learned."""

import copy
import json

import pytest

from sar_kd.config.sections import DataConfig
from sar_kd.data.chat.encoding import chat_prompt_ids, chat_templates, render
from sar_kd.data.chat.templates import TemplateSandbox
from sar_kd.data.dataset import build_dataset
from sar_kd.data.files.samples import conversation_of
from sar_kd.data.files.sources import load_documents
from sar_kd.data.tokenized_text import tokenize
from sar_kd.errors import UsageError
from sar_kd.tokenization.token_stream import FORMAT, PROMPT, RESPONSE, STOP
from sar_kd.tokenization.tokenizer_pair import TokenizerPair

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

QWEN3 = """
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- if tools %}{{ '<|im_start|>system\n# Tools' }}{% for t in tools %}{{ '\n' + (t | tojson) }}{% endfor %}
{{- '<|im_end|>\n' }}{% endif %}
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {%- set content = m.content %}{% set thought = '' %}
        {%- if m.reasoning_content is string %}{% set thought = m.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\n' }}
        {%- if loop.index0 > ns.last and (loop.last or thought) %}
            {{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}
        {%- endif %}
        {{- content }}
        {%- for call in m.tool_calls or [] %}
            {{- ('\n' if content or not loop.first else '') + '<tool_call>\n' + ((call.function or call) | tojson) }}
            {{- '\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif m.role == 'tool' %}{{ '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}
    {%- else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

R1 = (  # drops all reasoning, and opens it in the generation prompt
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<|User|>' + m.content }}"
    "{% elif m.role == 'assistant' %}{{ '<|Assistant|>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)

R1_KEEPING = R1.replace("m.content.split('</think>')[-1]", "m.content")

GPT_OSS = """
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {%- if m.thinking %}{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}
        {%- if m.tool_calls %}
            {%- set call = m.tool_calls[0].function or m.tool_calls[0] %}
            {{- '<|start|>assistant to=' + call.name + '<|channel|>commentary json<|message|>' }}
            {{- (call.arguments | tojson) + '<|call|>' }}
        {%- else %}
            {{- '<|start|>assistant<|channel|>final<|message|>' + m.content + ('<|return|>' if loop.last else '<|end|>') }}
        {%- endif %}
    {%- elif m.role == 'tool' %}{{ '<|start|>tool to=assistant<|message|>' + (m.content | tojson) + '<|end|>' }}
    {%- else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"""

MISTRAL = (  # takes no system message; a space before the answer, none in the prompt
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate user/assistant') }}"
    "{% endif %}{{ '[INST] ' + m.content + ' [/INST]' if m.role == 'user' else ' ' + m.content + eos_token }}{% endfor %}"
)

VICUNA = (  # its generation prompt ends with a word, and a space joins the answer
    "{% for m in messages %}{{ ('USER: ' if m.role == 'user' else 'ASSISTANT: ') + m.content }}"
    "{{ '\n' if m.role == 'user' else eos_token }}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)

GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
    "{{ m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)

TEMPLATES = {
    "gemma": (GEMMA, ["<start_of_turn>"], "<end_of_turn>"),
    "chatml": (CHATML, ["<|im_start|>"], "<|im_end|>"),
    "qwen3": (QWEN3, ["<|im_start|>", "<think>", "</think>"], "<|im_end|>"),
    "r1": (R1, ["<|User|>", "<|Assistant|>"], None),
    "r1 keeping": (R1_KEEPING, ["<|User|>", "<|Assistant|>"], None),
    "gpt-oss": (GPT_OSS, ["<|start|>", "<|channel|>", "<|message|>", "<|call|>", "<|return|>"], "<|end|>"),
    "mistral": (MISTRAL, [], None),
    "vicuna": (VICUNA, [], None),
}

ADD = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 1}}}
USER, TOOL, LAST = (
    {"role": "user", "content": "What is 1 + 1?"},
    {"role": "tool", "content": '{"sum": "2"}'},
    {"role": "assistant", "content": "It is 2."},
)
CALLING = {"role": "assistant", "content": None, "tool_calls": [ADD], "reasoning_content": "Use the tool."}
THINKING = {"role": "assistant", "content": "<think>\nOne more than one.\n</think>\n\nTwo."}
TIGHT = {"role": "assistant", "content": "<think>One more than one.</think>Two."}
FIELD = {"role": "assistant", "content": "Two.", "reasoning_content": "One more than one."}


@pytest.fixture(scope="module")
def tokenizers(byte_tokenizer, sp_tokenizer):
    """Of each template one with a byte-level tokenizer, and one with a SentencePiece-like one under 'sp NAME'."""
    made = {}
    for name, (template, special, stop) in TEMPLATES.items():
        for prefix, base in (("", byte_tokenizer), ("sp ", sp_tokenizer)):
            tokenizer = copy.deepcopy(base)
            tokenizer.add_tokens(special + ([stop] if stop else []), special_tokens=True)
            tokenizer.chat_template = template
            made[prefix + name] = tokenizer
    return made


def _pair(student, teacher):
    return TokenizerPair(student, teacher, student_vocab_size=len(student), teacher_vocab_size=len(teacher))


def _load(tmp_path, *examples):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, examples)))
    return load_documents(DataConfig(train_file=(str(path),), validation_file=(str(path),)))[0]


def _learned(tokenizer, stream):
    """The text of all targets."""
    return tokenizer.decode(stream.ids[stream.is_target].tolist())


def _behind_prompt(tokenizer, messages, number, tools=None):
    """The tokens of the whole text of `messages[: number + 1]` behind those of the generation prompt."""
    whole = tokenizer.apply_chat_template(messages[: number + 1], tools, return_dict=False)
    prompt = tokenizer.apply_chat_template(messages[:number], tools, add_generation_prompt=True, return_dict=False)
    assert whole[: len(prompt)] == prompt
    return whole[len(prompt) :]


ANSWERS = {
    "chatml": ("It is 2.", "It is 2.<|im_end|>"),
    "qwen3": ("It is 2.", "<think>\n\n</think>\n\nIt is 2.<|im_end|>"),
    "gpt-oss": ("It is 2.", "<|channel|>final<|message|>It is 2.<|return|>"),
    "mistral": ("It is 2.", " It is 2.<|endoftext|>"),
    "vicuna": ("It is 2.", " It is 2.<|endoftext|>"),
    "r1": ("It is 2.", "It is 2.<|endoftext|>"),
    "r1 keeping": ("<think>\nIt is 2.\n</think>\n\nTwo", "It is 2.\n</think>\n\nTwo<|endoftext|>"),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_all_that_the_template_writes_behind_the_generation_prompt_is_learned(tokenizers, tmp_path, name):
    answer, learned = ANSWERS[name]
    messages = [USER, {"role": "assistant", "content": answer}]
    tokenizer = tokenizers[name]
    stream = tokenize(_load(tmp_path, {"messages": messages}), _pair(tokenizer, tokenizer)).student
    assert _learned(tokenizer, stream) == learned
    if name not in ("r1", "r1 keeping"):  # their generation prompt is not the beginning of the whole text
        targets = stream.ids[stream.is_target].tolist()
        wanted = _behind_prompt(tokenizer, messages, 1)
        assert targets == wanted[: len(targets)]
        assert tokenizer.decode(wanted[len(targets) :]).strip() == ""


@pytest.mark.parametrize(
    ("name", "begin", "stop", "last_begin", "last_stop"),
    [
        ("chatml", "", "<|im_end|>", "", "<|im_end|>"),
        ("qwen3", "", "<|im_end|>", "<think>\n\n</think>\n\n", "<|im_end|>"),
        ("gpt-oss", "<|channel|>final<|message|>", "<|end|>", "<|channel|>final<|message|>", "<|return|>"),
        ("mistral", " ", "<|endoftext|>", " ", "<|endoftext|>"),
        ("r1", "", "<|endoftext|>", "", "<|endoftext|>"),
    ],
)
def test_the_work_of_a_long_conversation_grows_with_its_length(
    tokenizers, monkeypatch, name, begin, stop, last_begin, last_stop
):
    rendered, render_one = [], TemplateSandbox.render

    def count(sandbox, messages, **values):
        rendered.append(len(messages))
        return render_one(sandbox, messages, **values)

    monkeypatch.setattr(TemplateSandbox, "render", count)
    work = []
    for number in (20, 100):
        turns = [turn for i in range(number) for turn in (USER, {"role": "assistant", "content": f"It is {i}."})]
        stream = tokenize(_conversations(turns), _pair(tokenizers[name], tokenizers[name])).student
        learned = [f"{begin}It is {i}.{stop}" for i in range(number - 1)]
        learned.append(f"{last_begin}It is {number - 1}.{last_stop}")
        assert _learned(tokenizers[name], stream) == "".join(learned)
        work.append(sum(rendered))
        rendered.clear()
    assert work[1] < 7 * work[0]


@pytest.mark.parametrize("name", ["qwen3", "gpt-oss"])
def test_calls_in_a_long_conversation_are_learned_as_in_a_short_one(tokenizers, name):
    calls = [ADD | {"function": {"name": "add", "arguments": {"a": i, "b": 1}}} for i in range(20)]
    turns = [[USER, {"role": "assistant", "tool_calls": [call]}, TOOL, LAST] for call in calls]

    def learned(messages):
        return _learned(tokenizers[name], tokenize(_conversations(messages), _pair(*[tokenizers[name]] * 2)).student)

    # The last turn is written in another way than those before it.
    each = [learned([*turn, *turns[0]])[: -len(learned(turns[0]))] for turn in turns[:-1]]
    assert learned([message for turn in turns for message in turn]) == "".join(each) + learned(turns[-1])


@pytest.mark.parametrize("name", ["mistral", "vicuna"])
def test_a_space_that_the_template_writes_belongs_to_the_first_word_where_the_tokenizer_joins_them(tokenizers, name):
    tokenizer, other = tokenizers[name], tokenizers["sp chatml"]
    conversation = _conversations([USER, LAST | {"content": "the student."}])
    for pair in (_pair(tokenizer, tokenizer), _pair(tokenizer, other)):
        rendered = render(conversation, chat_templates(pair))
        (response,) = [span for span in rendered.sides[0][0] if span.kind == RESPONSE]
        assert response.has_dummy
        assert tokenizer.decode(list(response.ids)) == " the student."
        text = tokenize(conversation, pair)
        assert text.num_bytes == len("the student.")
    assert text.student.ends[-1] == text.teacher.ends[-1]


def _conversations(*examples):
    return [conversation_of(f"talk {i}", {"messages": messages}, "here") for i, messages in enumerate(examples)]


# Reasoning


@pytest.mark.parametrize("message", [THINKING, TIGHT, FIELD])
@pytest.mark.parametrize("name", ["qwen3", "gpt-oss"])
def test_reasoning_is_learned_where_the_template_writes_it(tokenizers, name, message):
    if name == "gpt-oss" and message is not FIELD:
        pytest.skip("it does not look for reasoning inside a content")
    tokenizer = tokenizers[name]
    text = tokenize(_conversations([USER, message]), _pair(tokenizer, tokenizer))
    assert (
        _learned(tokenizer, text.student)
        == {
            "qwen3": "<think>\nOne more than one.\n</think>\n\nTwo.<|im_end|>",
            "gpt-oss": "<|channel|>analysis<|message|>One more than one.<|end|>"
            "<|start|>assistant<|channel|>final<|message|>Two.<|return|>",
        }[name]
    )
    assert text.num_bytes == len("One more than one.Two.")
    assert list(text.skipped_documents) == list(text.dropped_answers) == []


def test_reasoning_in_a_prompt_and_completion_is_learned(tokenizers, tmp_path):
    tokenizer = tokenizers["qwen3"]
    example = {"prompt": [USER], "completion": THINKING["content"]}
    stream = tokenize(_load(tmp_path, example), _pair(tokenizer, tokenizer)).student
    assert _learned(tokenizer, stream) == "<think>\nOne more than one.\n</think>\n\nTwo.<|im_end|>"


@pytest.mark.parametrize("message", [THINKING, FIELD])
def test_a_turn_whose_reasoning_the_template_drops_is_no_target_and_is_counted(tokenizers, message):
    tokenizer = tokenizers["qwen3"]
    text = tokenize(_conversations([USER, message, USER, message]), _pair(tokenizer, tokenizer))
    assert _learned(tokenizer, text.student) == "<think>\nOne more than one.\n</think>\n\nTwo.<|im_end|>"
    assert list(text.dropped_answers) == ["talk 0 (the student's chat template drops a part of the answer)"]
    assert text.num_bytes == len("One more than one.Two.")


def test_a_conversation_without_an_answer_that_the_template_keeps_is_skipped_by_name(tokenizers):
    tokenizer = tokenizers["r1"]
    text = tokenize(_conversations([USER, THINKING], [USER, LAST]), _pair(tokenizer, tokenizer))
    assert list(text.skipped_documents) == ["talk 0 (the student's chat template drops a part of the answer)"]
    assert list(text.names) == ["talk 1"]


PAIRS = [("qwen3", "sp gpt-oss"), ("sp gpt-oss", "qwen3"), ("chatml", "sp qwen3"), ("sp mistral", "vicuna")]


@pytest.mark.parametrize("names", PAIRS)
@pytest.mark.parametrize("message", [LAST, FIELD, THINKING])
def test_both_models_learn_the_same_bytes_and_each_its_own_format(tokenizers, names, message):
    pair = _pair(*(tokenizers[name] for name in names))
    reads_field = [name.split(" ")[-1] in ("qwen3", "gpt-oss") for name in names]
    if message is FIELD and not all(reads_field):
        with pytest.raises(UsageError, match="chat template drops a part of the answer"):
            tokenize(_conversations([USER, message]), pair)
        return
    dataset = build_dataset(_conversations([USER, message], [USER, LAST]), pair, 300, 300)
    rendered = render(_conversations([USER, message], [USER, LAST]), chat_templates(pair))
    for side, table in zip(rendered.sides, rendered.tables, strict=True):
        contents = b"".join(
            table.spell(span.ids)[span.has_dummy and not span.dummy_is_text :]
            for span in side[0]
            if span.kind == RESPONSE
        )
        if message is THINKING and "qwen3" in " ".join(names):
            assert contents == b"One more than one.Two."
        elif message is LAST:
            assert contents.strip() == b"It is 2."
        assert [span.kind for span in side[0]].count(STOP) == 1
    text = dataset.text
    assert text.student.ends[-1] == text.teacher.ends[-1]
    batch = dataset.batch([0, 1])
    assert batch.alignment.num_chunks > 2
    gpt_oss = [side for side, name in zip(rendered.sides, names, strict=True) if "gpt-oss" in name]
    for side in gpt_oss:
        assert any(span.kind == FORMAT for span in side[0])


def test_a_text_that_a_template_takes_none_of_names_the_reason_and_the_remedy(tokenizers):
    system = [{"role": "system", "content": "Be brief."}, USER, LAST]
    with pytest.raises(UsageError) as error:
        tokenize(
            _conversations(system, system), _pair(tokenizers["gemma"], tokenizers["chatml"]), option="--dataset_name x"
        )
    assert str(error.value) == (
        "--dataset_name x: 2 of its 2 documents cannot be used: the student's chat template refuses it: System role not "
        "supported: talk 0, talk 1; leave the system messages out, or use a model whose chat template takes them"
    )


# Tools


@pytest.mark.parametrize("content", [None, ""])
@pytest.mark.parametrize("name", ["qwen3", "gpt-oss", "chatml"])
def test_tools_and_calls_reach_the_template_and_a_dropped_call_is_no_target(tokenizers, tmp_path, name, content):
    tokenizer = tokenizers[name]
    messages = [USER, CALLING | {"content": content}, TOOL, LAST]
    example = {"messages": messages, "tools": [{"name": "add", "parameters": {"a": "number"}}]}
    text = tokenize(_load(tmp_path, example), _pair(tokenizer, tokenizer))
    learned = _learned(tokenizer, text.student)
    if name == "chatml":  # writes neither calls nor reasoning: that turn must not be learned as an empty answer
        assert learned == "It is 2.<|im_end|>"
        assert list(text.dropped_answers) == ["a.jsonl:1 (the student's chat template drops a part of the answer)"]
        return
    whole = tokenizer.apply_chat_template(
        [{k: v for k, v in m.items() if v is not None} | {"content": m["content"] or ""} for m in messages],
        example["tools"], tokenize=False,
    )  # fmt: skip
    assert tokenizer.decode(text.student.ids.tolist()).strip() == whole.strip()
    assert ("# Tools" in whole) == (name == "qwen3")
    assert list(text.dropped_answers) == []
    assert (
        learned
        == {
            "qwen3": "<think>\nUse the tool.\n</think>\n\n<tool_call>\n"
            '{"name": "add", "arguments": {"a": 1, "b": 1}}\n</tool_call><|im_end|>'
            "<think>\n\n</think>\n\nIt is 2.<|im_end|>",
            "gpt-oss": "<|channel|>analysis<|message|>Use the tool.<|end|><|start|>assistant to=add<|channel|>commentary "
            'json<|message|>{"a": 1, "b": 1}<|call|><|channel|>final<|message|>It is 2.<|return|>',
        }[name]
    )


def test_calls_alone_are_learned_from_the_generation_prompt_on(tokenizers):
    tokenizer = tokenizers["qwen3"]
    calling = {"role": "assistant", "tool_calls": [ADD]}
    text = tokenize(_conversations([USER, calling, TOOL, LAST]), _pair(tokenizer, tokenizer))
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 1}}\n</tool_call><|im_end|>'
    assert _learned(tokenizer, text.student) == f"{call}<think>\n\n</think>\n\nIt is 2.<|im_end|>"


@pytest.mark.parametrize(
    "calls", [5, "x", {"name": "add"}, [5], [["add"]], [{"function": "add"}], [{"function": None}]]
)
def test_calls_of_an_unknown_form_that_the_template_does_not_write_are_no_target(tokenizers, calls):
    tokenizer = tokenizers["chatml"]
    calling = {"role": "assistant", "content": "I add.", "tool_calls": calls}
    text = tokenize(_conversations([USER, calling, TOOL, LAST]), _pair(tokenizer, tokenizer))
    assert _learned(tokenizer, text.student) == "It is 2.<|im_end|>"


def test_of_several_templates_the_one_for_tools_is_taken(tokenizers):
    tokenizer = copy.deepcopy(tokenizers["chatml"])
    tokenizer.chat_template = {"default": CHATML, "tool_use": QWEN3}
    (conversation,) = _conversations([USER, LAST])
    for tools, learned in (("", "It is 2."), ('[{"name": "add"}]', "<think>\n\n</think>\n\nIt is 2.")):
        stream = tokenize([conversation._replace(tools=tools)], _pair(tokenizer, tokenizer)).student
        assert _learned(tokenizer, stream) == f"{learned}<|im_end|>"


# Stop tokens


STOPS = {"chatml": "<|im_end|>", "qwen3": "<|im_end|>", "gpt-oss": "<|return|>", "mistral": "<|endoftext|>"}


@pytest.mark.parametrize("name", STOPS)
def test_stop_tokens_are_those_that_end_an_answer_and_stand_inside_none(tokenizers, name):
    tokenizer = tokenizers[name]
    message = FIELD if name in ("qwen3", "gpt-oss") else LAST
    text = tokenize(_conversations([USER, message]), _pair(tokenizer, tokenizer))
    assert text.stop_ids == ((tokenizer.convert_tokens_to_ids(STOPS[name]),),)
    assert (name == "gpt-oss") == (tokenizer.convert_tokens_to_ids("<|end|>") in text.inner_ids[0])
    assert not set(text.stop_ids[0]) & set(text.inner_ids[0])


def test_a_stop_token_of_an_unknown_name_is_the_last_special_token_of_the_message(tokenizers):
    tokenizer = copy.deepcopy(tokenizers["chatml"])
    tokenizer.add_tokens(["<|over|>"], special_tokens=True)
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "<|over|>")
    text = tokenize(_conversations([USER, LAST, USER, LAST]), _pair(tokenizer, tokenizer))
    assert _learned(tokenizer, text.student) == "It is 2.<|over|>" * 2
    assert text.stop_ids == ((tokenizer.convert_tokens_to_ids("<|over|>"),),)


# Templates that do not end


@pytest.mark.slow
def test_a_template_that_never_ends_stops_the_run_with_one_line(tokenizers):
    endless = copy.deepcopy(tokenizers["chatml"])
    endless.chat_template = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(UsageError, match=r"--student_model: its chat template does not end: [^\n]*$"):
        tokenize(_conversations([USER, LAST]), _pair(endless, tokenizers["sp chatml"]))


@pytest.mark.parametrize("template", ["{{ 1 / 0 }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"])
def test_a_template_that_fails_is_named_with_the_document(tokenizers, template):
    failing = copy.deepcopy(tokenizers["chatml"])
    failing.chat_template = "{% if messages[0].content == 'bad' %}" + template + "{% endif %}" + CHATML
    bad = [{"role": "user", "content": "bad"}, LAST]
    text = tokenize(_conversations(bad, [USER, LAST]), _pair(failing, failing))
    assert list(text.names) == ["talk 1"]
    (skipped,) = text.skipped_documents
    assert skipped.startswith("talk 0 (the student's chat template refuses it: ")


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_prompt_of_generate_is_that_of_the_template(tokenizers, name):
    tokenizer = tokenizers[name]
    wanted = tokenizer.apply_chat_template([USER], add_generation_prompt=True, return_dict=False)
    assert chat_prompt_ids(tokenizer, USER["content"]) == wanted
    failing = copy.deepcopy(tokenizer)
    for template in ("{{ 1 / 0 }}", "{% for %}", "{{ 'x' * 20000000000 }}"):
        failing.chat_template = template
        with pytest.raises(ValueError, match=r"\w") as error:
            chat_prompt_ids(failing, "a")
        assert "\n" not in str(error.value)


def test_the_prompt_of_generate_has_the_date_that_is_given(tokenizers):
    tokenizer = copy.deepcopy(tokenizers["chatml"])
    tokenizer.chat_template = "{{ strftime_now('%Y') }}|" + CHATML
    assert tokenizer.decode(chat_prompt_ids(tokenizer, "a", "1987-01-31")).startswith("1987|")
    assert not tokenizer.decode(chat_prompt_ids(tokenizer, "a")).startswith("1987|")


def test_the_prompt_s_kind_is_read_and_not_predicted(tokenizers):
    rendered = render(_conversations([USER, LAST]), chat_templates(_pair(tokenizers["qwen3"], tokenizers["qwen3"])))
    kinds = [span.kind for span in rendered.sides[0][0]]
    assert kinds.index(PROMPT) < kinds.index(FORMAT) < kinds.index(RESPONSE) < kinds.index(STOP)
