"""Ollama's template of a chat template: it writes what the chat template writes, or there is none."""

import re

import pytest

from sar_kd.data.chat.encoding import DEFAULT_TEMPLATE
from sar_kd.data.chat.ollama import find_template, modelfile

CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HEADERS = (
    "{{ bos_token }}{% for m in messages %}<|header|>{{ m.role }}<|end|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|header|>assistant<|end|>\n\n{% endif %}"
)
SYSTEM_IN_FIRST_TURN = (
    "{{ bos_token }}{% set system = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}"
    "{% for m in messages if m.role != 'system' %}<turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ system if loop.first }}{{ m.content }}<end>\n{% endfor %}{% if add_generation_prompt %}<turn>model\n{% endif %}"
)
WITHOUT_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
COUNTING = "{% for m in messages %}{{ loop.index }}: {{ m.content }}\n{% endfor %}"
DROPPING = "{{ messages[-1].content }}"
FORMS = {
    "chatml": CHATML, "headers": HEADERS, "folded": SYSTEM_IN_FIRST_TURN, "none": WITHOUT_SYSTEM,
    "default": DEFAULT_TEMPLATE,
}  # fmt: skip
S, U, A = ({"role": role, "content": f"the {role}\n says"} for role in ("system", "user", "assistant"))


class _Tokenizer:
    """What is asked of one."""

    bos_token, eos_token, bos_token_id = "<s>", "</s>", 1
    special_tokens_map = {"bos_token": "<s>", "eos_token": "</s>"}  # noqa: RUF012

    def __init__(self, template, puts_start=False):
        self.chat_template, self.puts_start = template, puts_start

    def __call__(self, texts, **options):
        ids = [7] if options.get("add_special_tokens") is False or not self.puts_start else [1, 7]
        return {"input_ids": ids if isinstance(texts, str) else [ids for _ in texts]}

    def convert_ids_to_tokens(self, id_):
        return f"<{id_}>"


def _go(template: str, messages: list[dict]) -> str:
    """The part of Go's text/template that these templates use: if, else, range, fields."""
    tokens = re.split(r"(\{\{ .*? \}\})", template)

    def condition(words, scope):
        if words == ".System":
            return bool(scope["System"])
        if found := re.fullmatch(r'eq \.Role "(\w+)"', words):
            return scope["m"]["role"] == found[1]
        assert words == "not (and $.System (eq $i 1))"
        return not (scope["System"] and scope["i"] == 1)

    def run(i, scope, active):
        """Writes up to the matching else or end; returns the text and where it stands."""
        text = ""
        while i < len(tokens):
            token = tokens[i][3:-3] if tokens[i].startswith("{{ ") else None
            if token is None:
                text += tokens[i]
            elif token == ".System":
                text += scope["System"]
            elif token == ".Content":
                text += scope["m"]["content"] if active else ""
            elif token.startswith("range"):
                body, end = "", i
                for number, message in enumerate(scope["Messages"]):
                    part, end = run(i + 1, {**scope, "i": number, "m": message}, active)
                    body += part
                text, i = text + body, end
            elif token.startswith("if "):
                chosen, taken, words = "", False, token[3:]
                while True:
                    holds = words is None or (active and condition(words, scope))
                    part, i = run(i + 1, scope, active and holds and not taken)
                    chosen, taken = (part, True) if holds and not taken else (chosen, taken)
                    if tokens[i] == "{{ end }}":
                        break
                    words = tokens[i][3:-3].removeprefix("else").strip().removeprefix("if ") or None
                text += chosen
            else:
                assert token == "end" or token.startswith("else")
                return text, i
            i += 1
        return text, i

    system = "".join(m["content"] for m in messages if m["role"] == "system")
    return run(0, {"System": system, "Messages": messages, "m": {"role": "", "content": ""}, "i": 0}, True)[0]


@pytest.mark.parametrize("messages", [[U], [U, A, U], [S, U], [S, U, A, U, A, U]], ids=["u", "uau", "su", "suauau"])
@pytest.mark.parametrize("form", FORMS)
def test_the_go_template_writes_what_the_chat_template_writes(form, messages):
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    if form == "none" and messages[0] is S:
        return
    found = find_template(_Tokenizer(FORMS[form]))
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    expected = environment.from_string(FORMS[form]).render(
        messages=messages, add_generation_prompt=True, bos_token="<s>", eos_token="</s>", raise_exception=None
    )
    assert found.render(messages) == expected
    assert _go(found.go(), messages) == expected


def test_a_start_token_that_the_tokenizer_puts_is_left_to_llama_cpp():
    assert find_template(_Tokenizer(HEADERS, puts_start=True)).go().startswith("{{ if .System }}<|header|>system")
    assert find_template(_Tokenizer(HEADERS)).go().startswith("{{ if .System }}<s><|header|>system")


@pytest.mark.parametrize(
    "template", [COUNTING, DROPPING, "{{ 1 +", CHATML.replace("Be kind", "Be {% raw %}{{{% endraw %}")]
)
def test_a_template_that_does_more_has_no_equal(template):
    tokenizer = _Tokenizer(template)
    assert find_template(tokenizer) is None
    text, said = modelfile("a.gguf", tokenizer, [2])
    assert 'TEMPLATE "' not in text
    assert text.startswith("FROM ./a.gguf\n# No TEMPLATE: ")
    assert said.startswith("Warning: no template")


def test_a_modelfile_names_the_file_the_template_and_every_stop_token():
    text, said = modelfile("a-q8_0.gguf", _Tokenizer(CHATML), [2, 9])
    assert text.startswith('FROM ./a-q8_0.gguf\nTEMPLATE """{{ if .System }}<|im_start|>system\n')
    assert text.endswith('<|im_start|>assistant\n"""\nPARAMETER stop "<2>"\nPARAMETER stop "<9>"\n')
    assert said.endswith("stop tokens <2> <9>")
    text, said = modelfile("a.gguf", _Tokenizer(WITHOUT_SYSTEM), [])
    assert ".System" not in text
    assert "takes no system message; stop tokens none" in said
    assert 'TEMPLATE """{{ .Prompt }}"""' in modelfile("a.gguf", _Tokenizer(None), [])[0]
