# ruff: noqa: E501 (templates have long lines)
"""Chat templates: the text that transformers renders, and an end to those that loop or fill the memory."""

import time
from datetime import datetime

import pytest

from sar_kd.data.chat.templates import TemplateFailure, TemplateSandbox, TooMuchWork

NOW = datetime(2024, 3, 5)
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " What\nnow? {1} "},
    {"role": "assistant", "content": "", "tool_calls": [{"name": "add", "arguments": {"a": "\u00e9<b>", "n": [1, 2.5]}}]},
    {"role": "tool", "content": "3"},
    {"role": "assistant", "content": "Three.", "reasoning_content": "1 + 2"},
]  # fmt: skip
TOOLS = [{"name": "add", "description": "Adds.", "parameters": {"a": {"type": "string"}}}]

SOUND = {
    "lines": "{% for m in messages %}\n  {% if m.content %}\n{{ m.role }}: {{ m.content }}\n  {% endif %}\n{% endfor %}\n",
    "concatenation": "{% for m in messages %}{{ '<' ~ m.role ~ '>' ~ m.content ~ loop.index ~ none ~ 1.5 }}{% endfor %}",
    "json": "{{ tools | tojson }}{{ tools | tojson(indent=2) }}{{ messages[2].tool_calls[0].arguments | tojson }}",
    "macro": "{% macro say(m, end='.') %}[{{ m.content }}{{ end }}]{% endmacro %}"
    "{% for m in messages %}{{ say(m) }}{{ say(m, end='!') }}{% endfor %}",
    "namespace": "{% set ns = namespace(n=0, text='') %}{% for m in messages %}{% set ns.n = ns.n + 2 * loop.index %}"
    "{% set ns.text = ns.text + m.role %}{% endfor %}{{ ns.n }}{{ ns.text }}{{ 7 % 4 }}{{ 2 ** 5 }}{{ '-' * 5 }}",
    "loop control": "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}"
    "{% if loop.index > 3 %}{% break %}{% endif %}{% else %}none{% endfor %}",
    "formats": "{{ '%s-%05d' % ('a', 3) }}{{ '{:>9}|{}'.format('b', 4) }}{{ 'a,b'.split(',') | join('; ') }}"
    "{{ messages[1].content.strip().replace('{1}', 'x') | upper }}{{ 'q' | center(9) }}{{ 'a\nb' | indent(3) }}",
    "generation": "{% set x = 1 %}{% for m in messages %}{% generation %}{% set x = 2 %}{{ m.content }}{% endgeneration %}"
    "{% endfor %}{{ x }}",
    "filters": "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | first | trim | length }}"
    "{{ messages | map(attribute='role') | map('length') | list }}{{ messages[::-1] | map(attribute='role') | unique | sort | join }}"
    "{{ messages | rejectattr('tool_calls', 'defined') | list | length }}{{ {'b': 1, 'a': 2} | dictsort }}",
    "tests": "{{ messages is defined }}{{ nothing is defined }}{{ messages[0].content is string }}{{ tools is iterable }}"
    "{{ messages[0].nothing }}{{ messages is mapping }}{{ dict(a=1).items() | list }}{{ range(3) | list }}",
    "blocks": "{% set text %}{% for m in messages %}{{ m.role }},{% endfor %}{% endset %}{{ text | length }}{{ text }}"
    "{% filter upper %}{{ text }}{% endfilter %}{% macro f() %}<{{ caller(3) }}>{% endmacro %}"
    "{% call(x) f() %}{{ x }}{% endcall %}",
    "special": "{{ bos_token }}{% if add_generation_prompt %}{{ eos_token }}{% endif %}{{ documents }}{{ tools is none }}",
    "recursive": "{% for m in [1, [2, [3]]] recursive %}{% if m is number %}{{ m }}{% else %}({{ loop(m) }}){% endif %}{% endfor %}",
}  # fmt: skip


@pytest.mark.parametrize("name", SOUND)
@pytest.mark.parametrize("prompts", [True, False])
def test_a_template_renders_as_transformers_renders_it(byte_tokenizer, name, prompts):
    found = TemplateSandbox(SOUND[name], NOW).render(
        MESSAGES, tools=TOOLS, documents=None, add_generation_prompt=prompts, **byte_tokenizer.special_tokens_map
    )
    assert found == byte_tokenizer.apply_chat_template(
        MESSAGES, TOOLS, chat_template=SOUND[name], add_generation_prompt=prompts, tokenize=False
    )


def test_the_date_is_the_given_one():
    assert TemplateSandbox("{{ strftime_now('%d %b %Y') }}", NOW).render(MESSAGES) == "05 Mar 2024"


GROW = "{% set ns = namespace(x=START) %}{% for i in range(90) %}{% set ns.x = STEP %}{% endfor %}{{ ns.x }}"
HUGE = "2" + "0" * 10
MILLION = "{% set x = 'x' * 1000000 %}"
ENDLESS = {
    "loops": "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "calls": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(90) }}",
    "loop filter": "{% for i in range(100000) %}{{ range(100000) | list | length }}{% endfor %}",
    "a long text": f"{{{{ 'x' * {HUGE} }}}}",
    "a long list": f"{{{{ ([1] * {HUGE}) | length }}}}",
    "doubled by ~": GROW.replace("START", "'x'").replace("STEP", "ns.x ~ ns.x"),
    "doubled by +": GROW.replace("START", "'x'").replace("STEP", "ns.x + ns.x"),
    "doubled by %": GROW.replace("START", "'x'").replace("STEP", "'%s%s' % (ns.x, ns.x)"),
    "doubled by format": GROW.replace("START", "'x'").replace("STEP", "'{0}{0}'.format(ns.x)"),
    "doubled by replace": GROW.replace("START", "'x'").replace("STEP", "ns.x.replace('x', 'xx')"),
    "doubled by join": GROW.replace("START", "'x'").replace("STEP", "[ns.x, ns.x] | join"),
    "nested lists": GROW.replace("START", "[1]").replace("STEP", "[ns.x, ns.x]"),
    "nested lists in json": GROW.replace("START", "[1]").replace("STEP", "[ns.x, ns.x]").replace("{{ ns.x", "{{ ns.x | tojson"),
    "squares": GROW.replace("START", "7").replace("STEP", "ns.x * ns.x"),
    "a power": "{{ 10 ** 10000000000 }}",
    "output": MILLION + "{% for i in range(100000) %}{{ x }}{% endfor %}",
    "output of a macro": MILLION + "{% macro f() %}{% for i in range(99999) %}{{ x }}{% endfor %}{% endmacro %}{{ f() }}",
    "its own text": "{% for i in range(100000) %}" + "y" * 10000 + "{% endfor %}",
    "replace": MILLION + "{{ x | replace('x', x) }}",
    "join": MILLION + "{{ x | join(x) }}",
    "join method": MILLION + "{{ x.join(x) }}",
    "center": f"{{{{ 'x' | center({HUGE}) }}}}",
    "ljust": f"{{{{ 'x'.ljust({HUGE}) }}}}",
    "indent": f"{{{{ 'a\nb' | indent({HUGE}) }}}}",
    "tojson": f"{{{{ [1] | tojson(indent={HUGE}) }}}}",
    "a width": f"{{{{ '%{HUGE}d' % 3 }}}}",
    "a width of format": f"{{{{ '{{:>{HUGE}}}'.format(3) }}}}",
    "a given width": f"{{{{ '%*d' % ({HUGE}, 3) }}}}",
    "a given width of format": f"{{{{ '{{:>{{}}}}'.format(3, {HUGE}) }}}}",
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if "nested" in name else name for name in ENDLESS]
)
def test_a_template_without_an_end_is_stopped(name):
    sandbox = TemplateSandbox(ENDLESS[name], NOW)
    started = time.process_time()
    with pytest.raises(TooMuchWork):
        sandbox.render(MESSAGES)
    assert time.process_time() - started < 20


FAILING = {
    "an exception": ("{{ raise_exception('no such turns\\nat all') }}", "no such turns$"),
    "a division": ("{{ 1 / 0 }}", "division by zero"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "a range": ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
    "an attribute": ("{{ ''.__class__.__mro__ }}", "unsafe|undefined"),
    "a namespace": ("{% set n = namespace(__class__=1) %}{{ n }}", "takes no attribute '__class__'"),
    "a namespace's attribute": ("{% set n = namespace() %}{% set n._x = 1 %}{{ n }}", "takes no attribute '_x'"),
    "a changed message": ("{{ messages.append(1) }}", "unsafe"),
    "a number too long to write": ("{{ 7 ** 9999 }}", "integer string conversion|characters' work"),
}


@pytest.mark.parametrize("name", FAILING)
def test_a_template_that_fails_raises_with_one_line(name):
    template, reason = FAILING[name]
    with pytest.raises((TemplateFailure, TooMuchWork), match=reason):
        TemplateSandbox(template, NOW).render(MESSAGES)


def test_a_template_that_is_none_is_refused():
    with pytest.raises(TemplateFailure, match="Expected an expression"):
        TemplateSandbox("{% for m in %}", NOW)


def test_a_long_conversation_has_a_higher_limit():
    messages = [{"role": "user", "content": "word " * 100}] * 20000
    text = TemplateSandbox(
        "{% for m in messages %}{{ '<' ~ m.role ~ '>' + m.content | trim }}{% endfor %}", NOW
    ).render(messages)
    assert len(text) == 20000 * (len("<user>") + 499)
