"""Chat templates against transformers, and templates that mean harm."""

import json
import sys
import threading
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from tokenizer_makers import byte_level_bpe
from transformers import AutoTokenizer

from loraserve.errors import InvalidArgumentError, InvalidCheckpointError
from loraserve.text.chat_template import (
    MAX_DEPTH,
    MAX_MESSAGES,
    MAX_SOURCE_CHARACTERS,
    ChatTemplate,
)
from loraserve.text.tokenizer import Tokenizer

# In the style of Llama 3: headers, a date, tools as JSON, text stripped.
HEADERS = """{{- bos_token }}
{%- if not date_string is defined %}{% set date_string = strftime_now("%Y") %}{% endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|header|>system<|/header|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Year: " + date_string + "\\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message }}
{{- "<|turn|>" }}
{%- for message in messages %}
    {%- if 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}
            {{- raise_exception("only one tool call at once") }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '{"name": "' + call.name + '", "parameters": ' }}{{ call.arguments | tojson }}{{ "}" }}
    {%- else %}
        {{- '<|header|>' + message['role'] + '<|/header|>\\n\\n' + message['content'] | trim }}
    {%- endif %}
    {{- '<|turn|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|header|>assistant<|/header|>\\n\\n' }}
{%- endif %}
"""
# In the style of Qwen: chatml, a namespace, thinking cut out, loop controls.
CHATML = """{%- set ns = namespace(last=-1, seen=[]) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages | length - 1) - loop.index0 %}
    {%- if message.role == "user" and ns.last < 0 %}
        {%- set ns.last = index %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{% for message in messages %}
    {% if message.content is string %}
        {%- set content = message.content %}
    {% else %}
        {%- set content = message.content | map(attribute='text') | join('+') %}
    {% endif %}
    {%- if message.role == "assistant" %}
{% generation %}
        {%- set reasoning = message.reasoning_content if message.reasoning_content else '' %}
        {%- if '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1] %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last %}<think>{{ reasoning.strip('\\n') }}</think>{% endif %}
        {{- content ~ '<|im_end|>' ~ '\\n' }}
{% endgeneration %}
        {%- continue %}
    {%- endif %}
    {{- '<|im_start|>%s\\n' % message.role }}{{ content }}{{ '<|im_end|>\\n' }}
{% endfor %}
{% if tools %}{{ tools | map('tojson') | join(', ') }}{% endif %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}
{%- endif %}"""
# In the style of Mistral: strict alternation, no roles.
INST = """{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('roles must alternate user/assistant/user/assistant/...') }}
{% endif %}
{% if message['role'] == 'user' %}
{{ '[INST] ' + message['content'] + ' [/INST]' }}
{% else %}
{{ message['content']|replace('\\n', ' ') + eos_token }}
{% endif %}
{% endfor %}"""

USER = {"role": "user", "content": " Grüße <b>&amp;</b> 😀 \n"}
ANSWER = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHi\nthere "}
SYSTEM = {"role": "system", "content": "Be short. \n"}
PARTS = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"function": {"name": "f", "arguments": {"city": "Köln", "n": [1, 2.5]}}}],
}
THOUGHT = {"role": "assistant", "content": "yes", "reasoning": "because"}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"é": None, "b": True}}}]

CASES = [
    (HEADERS, [SYSTEM, USER], {}),
    (HEADERS, [USER, ANSWER, USER], {"tools": TOOLS}),
    (HEADERS, [USER, CALL], {"tools": TOOLS, "add_generation_prompt": False}),
    (HEADERS, [USER], {"tools": TOOLS, "date_string": "1999", "bos_token": "<other>"}),
    (CHATML, [SYSTEM, USER, ANSWER, PARTS], {}),
    (CHATML, [USER, ANSWER, USER, THOUGHT], {"tools": TOOLS}),
    (CHATML, [USER], {"enable_thinking": False}),
    (CHATML, [USER, ANSWER], {"add_generation_prompt": False, "enable_thinking": True}),
    (INST, [USER, ANSWER, USER], {}),
    (INST, [USER, ANSWER], {"add_generation_prompt": False}),
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_level_bpe(tmp_path_factory.mktemp("chat"))


@pytest.mark.parametrize(("source", "messages", "options"), CASES)
def test_equals_transformers(
    source: str, messages: list[dict[str, Any]], options: dict[str, Any], directory: Path
) -> None:
    (directory / "chat_template.jinja").write_text(source)
    options = {"add_generation_prompt": True, **options}
    theirs = AutoTokenizer.from_pretrained(directory)
    template = ChatTemplate.of_tokenizer(Tokenizer.from_directory(directory))
    assert template is not None
    want = theirs.apply_chat_template(messages, tokenize=False, **options)
    assert want.strip()
    assert template.render(messages, **options) == want


def test_ids_equal_transformers(directory: Path) -> None:
    (directory / "chat_template.jinja").write_text(CHATML)
    theirs = AutoTokenizer.from_pretrained(directory)
    tokenizer = Tokenizer.from_directory(directory)
    template = ChatTemplate.of_tokenizer(tokenizer)
    assert template is not None
    want = theirs.apply_chat_template([USER], add_generation_prompt=True)["input_ids"]
    assert tokenizer.encode(template.render([USER]), add_special_tokens=False) == want


def test_tools_have_their_own_template(directory: Path) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    (directory / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": named}))
    template = ChatTemplate.of_tokenizer(Tokenizer.from_directory(directory))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    assert template is not None
    assert template.render([USER]) == "plain"
    assert template.render([USER], tools=TOOLS) == "tools"
    assert ChatTemplate.of_tokenizer(Tokenizer.from_directory(directory)) is None


def test_time_is_what_the_caller_says() -> None:
    template = ChatTemplate("{{ strftime_now('%d %b %Y') }}", now=lambda: datetime(2024, 7, 26))
    assert template.render([USER]) == "26 Jul 2024"


def test_what_the_template_refuses_is_about_the_messages() -> None:
    with pytest.raises(InvalidArgumentError, match="roles must alternate") as caught:
        ChatTemplate(INST).render([ANSWER])
    assert caught.value.field == "messages"


HOSTILE = {
    "endless": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "nested list": "{% set x = range(9999)|list %}{% for a in x %}{% for b in x %}"
    "{% endfor %}{% endfor %}",
    "output": "{% for a in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
    "literal": "{% set t %}{% for a in range(99999) %}" + "y" * 9999 + "{% endfor %}{% endset %}",
    "times": "{{ 'x' * 10000000000 }}",
    "times list": "{{ ([0] * 10000000000)|length }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "range": "{% for i in range(10000000000) %}{% endfor %}",
    "doubling": "{% set ns = namespace(x='x') %}{% for i in range(60) %}"
    "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "doubling plus": "{% set ns = namespace(x='x') %}{% for i in range(60) %}"
    "{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "doubling join": "{% set ns = namespace(x='x') %}{% for i in range(60) %}"
    "{% set ns.x = [ns.x, ns.x]|join %}{% endfor %}",
    "doubling method": "{% set ns = namespace(x='x') %}{% for i in range(60) %}"
    "{% set ns.x = ns.x.join([ns.x, ns.x, ns.x]) %}{% endfor %}",
    "replace": "{% set ns = namespace(x='xx') %}{% for i in range(60) %}"
    "{% set ns.x = ns.x.replace('x', ns.x) %}{% endfor %}",
    "replace filter": "{% set ns = namespace(x='xx') %}{% for i in range(60) %}"
    "{% set ns.x = ns.x|replace('x', ns.x) %}{% endfor %}",
    "tower": "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}"
    "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "tower json": "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}"
    "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x|tojson }}",
    "center": "{{ 'x'|center(10000000000) }}",
    "center method": "{{ 'x'.center(10000000000) }}",
    "indent": "{{ 'x'|indent(10000000000, first=true) }}",
    "percent": "{{ '%10000000000d' % 1 }}",
    "percent star": "{{ '%*d' % (10000000000, 1) }}",
    "format filter": "{{ '%10000000000d'|format(1) }}",
    "format method": "{{ '{:10000000000}'.format(1) }}",
    "format nested": "{{ '{:{w}}'.format(1, w=10000000000) }}",
    "percent precision": "{{ '%.10000000000f' % 1 }}",
    "percent name": "{{ '%(a)10000000000d' % {'a': 1} }}",
    "translate": "{{ ('x' * 99999).translate({120: 'y' * 99999}) }}",
    "format map": "{{ '{a:10000000000}'.format_map({'a': 1}) }}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "attr filter": "{{ ''|attr('__class__') }}{{ (''|attr('__class__')).__mro__ }}",
    "format escape": "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
    "globals": "{{ raise_exception.__globals__['json'] }}",
    "mutation": "{{ messages.append(1) }}",
    "namespace": "{{ namespace(__class__=1) }}",
    "namespace set": "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "lipsum": "{{ lipsum(100000) }}",
    "import": "{% import 'os' as os %}",
    "include": "{% include '/etc/passwd' %}",
    "undefined": "{{ nothing.at.all }}",
    "type": "{{ messages + 1 }}",
}


@pytest.mark.parametrize("name", list(HOSTILE))
def test_hostile_templates_end_in_a_typed_error(name: str) -> None:
    template = ChatTemplate(HOSTILE[name])
    before = time.thread_time()  # its own: whatever else the machine does
    with pytest.raises(InvalidArgumentError) as caught:
        template.render([USER])
    assert caught.value.field in ("chat_template", "messages")
    assert time.thread_time() - before < 60


def test_formats_of_usual_size_work() -> None:
    source = """{{ '**%s** %5.1f%%' % ('a', 2) }}{{ '{{x: {:>4}}}'.format(7) }}"""
    assert ChatTemplate(source).render([USER]) == "**a**   2.0%{x:    7}"


def test_the_tracer_of_the_thread_is_put_back() -> None:
    def tracer(*_: Any) -> None:
        return None

    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        ChatTemplate("x").render([USER])
        with pytest.raises(InvalidArgumentError):
            ChatTemplate(HOSTILE["times"]).render([USER])
        assert sys.gettrace() is tracer
    finally:
        sys.settrace(before)


@pytest.mark.parametrize(
    "source",
    [
        "{% if %}",
        "{{ 'x' ",
        "{% unknown %}",
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{% if a %}" * 150,
        "x" * (MAX_SOURCE_CHARACTERS + 1),
        "{{ 1|no_such_filter }}",
    ],
)
def test_broken_templates(source: str) -> None:
    with pytest.raises(InvalidCheckpointError) as caught:
        ChatTemplate(source)
    assert caught.value.field == "chat_template"


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ([], "messages"),
        ("hello", "messages"),
        ({"role": "user"}, "messages"),
        ([USER] * (MAX_MESSAGES + 1), "messages"),
        ([USER, "hello"], "messages[1]"),
        ([{"role": "user", "content": object()}], "messages[0]"),
        ([{1: "user"}], "messages[0]"),
    ],
)
def test_bad_messages(messages: Any, field: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        ChatTemplate(CHATML).render(messages)
    assert caught.value.field == field


def test_deep_messages() -> None:
    deep: Any = "x"
    for _ in range(MAX_DEPTH + 1):
        deep = [deep]
    with pytest.raises(InvalidArgumentError, match="deeper"):
        ChatTemplate(CHATML).render([{"role": "user", "content": deep}])


def test_long_chats_fit_the_budget() -> None:
    chat = [{"role": "user", "content": "word " * 200}, {"role": "assistant", "content": "ok"}]
    text = ChatTemplate(CHATML).render(chat * 500)
    assert text.count("<|im_start|>") == 1001
    assert len(ChatTemplate(CHATML).render([{"role": "user", "content": "x" * (4 << 20)}])) > 4e6


def test_threads_do_not_share_a_budget() -> None:
    template = ChatTemplate(CHATML)
    results: list[str] = []

    def work(i: int) -> None:
        for _ in range(20):
            results.append(template.render([{"role": "user", "content": str(i)}]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 80
    assert len(set(results)) == 4
