"""Chat templates are strangers' programs: what goes wrong in them is a UsageError, and what they use up is bounded."""

from __future__ import annotations

import time
from typing import Any

import pytest

from roundexport.errors import ArtifactError, UsageError
from roundexport.runtime.chat_template import ChatTemplate, choose, read_templates

USER = [{"role": "user", "content": "Grüße"}]
REFUSED = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% set x=9**99 %}{{ x**x }}",
    "{{ 'a'*10**9 }}",
    "{{ 10**6*'abcdefghijkl' }}",
    "{{ [1]*10**8 }}",
    "{% set ns=namespace(s='a') %}{% for i in range(60) %}{% set ns.s=ns.s+ns.s %}{% endfor %}",
    "{% set ns=namespace(s='a') %}{% for i in range(60) %}{% set ns.s=ns.s~ns.s %}{% endfor %}",
    "{% set ns=namespace(s='a') %}{% for i in range(60) %}"
    "{% set t %}{{ns.s}}{{ns.s}}{% endset %}{% set ns.s=t %}{% endfor %}",
    "{{ '%999999999d' % 1 }}",
    "{{ '%999999999d'|format(1) }}",
    "{{ '{:>999999999}'.format(1) }}",
    "{{ '{:{w}}'.format(1,w=999999999) }}",
    "{{ 'a'|center(999999999) }}",
    "{{ 'a'.ljust(999999999) }}",
    "{{ 'a\nb'|indent(999999999) }}",
    "{% set a='a'*9999999 %}{{ a.replace('a', a) }}",
    "{% set a='a'*99999 %}{{ ([a]*99999)|join(a) }}",
    "{% set a='a'*99999 %}{{ a.join([a]*99999) }}",
    "{% set a='a'*9999999 %}{{ [a]*99999 }}",
    "{% set ns=namespace(s=['a']) %}{% for i in range(60) %}{% set ns.s=[ns.s,ns.s] %}{% endfor %}{{ ns.s }}",
    "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(200) }}",
    "{% for i in range(99999) %}{{ 'abcdefghij'*50 }}{% endfor %}",
    "{% include 'x' %}",
    "{% import 'x' as y %}",
    "{{ lipsum(n=99999) }}",
    "{{ range(10**9)|list }}",
    "{% for m in messages %}",
    "{{ messages[9].content.x }}",
    "{{ messages|tojson(indent=999999999) }}",
    "{% set ns=namespace(a=1) %}{% set ns._x=1 %}",
    "{{ [1]|batch(999999999, 'x')|list }}",
    "{{ [1]|slice(999999999)|list }}",
    "{{ range(100000)|map('string')|map('center', 999999)|list }}",
    "{% for i in range(99999)|list*99 %}x{% endfor %}",
    "{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "{{ 1/0 }}",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "{{ 'x' }}" * 200_000,
    "{{ none() }}",
    "{{ messages.x.y }}",
    "{{ messages | nofilter }}",
    "{{ raise_exception('roles must alternate') }}",
]


@pytest.mark.parametrize("source", REFUSED, ids=[source[:60] for source in REFUSED])
def test_whatever_goes_wrong_in_a_template_is_a_usage_error_within_seconds(source: str) -> None:
    began = time.perf_counter()
    with pytest.raises(UsageError, match=r"the chat template refuses these messages: .+"):
        ChatTemplate(source).render(USER)
    assert time.perf_counter() - began < 15  # 10 s is the bound, a second or two what the worst takes


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("{{ 9**9**9 }}", str(9**81)),
        ("{{ ''.__class__ }}", ""),
        ("{{ ('9'*99999)|int }}", "0"),
        ("{{ '-' * 40 }}{{ 2 ** 10 }}{{ 7 % 3 }}{{ '%05.2f' % 1.5 }}", "-" * 40 + "1024" + "1" + "01.50"),
        ("{% for i in range(3) %}{{ loop.revindex }}{{ loop.length }}{% else %}none{% endfor %}", "332313"),
        ("{% for i in nothing %}x{% else %}none{% endfor %}", "none"),
        ("{% for i in messages | reverse %}{{ loop.length }}{% endfor %}", "1"),
        ("{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}", "role=user;content=Grüße;"),
        ("{% for a in [1, [2, [3]]] recursive %}{{ loop(a) if a is iterable else a }}{% endfor %}", "123"),
        ("{{ '{:>5}|{}'.format('a', 2) }}{{ 'a'.center(3) }}{{ 'aba'.replace('a', 'cc') }}", "    a|2 a ccbcc"),
        ("{% set ns = namespace(n=1) %}{% for i in range(4) %}{% set ns.n = ns.n * 2 %}{% endfor %}{{ ns.n }}", "16"),
    ],
)
def test_ordinary_expressions_are_unchanged(source: str, shown: str) -> None:
    assert ChatTemplate(source).render(USER) == shown


def test_content_keeps_the_blanks_that_the_template_keeps() -> None:
    messages = [{"role": "user", "content": "\n  two\n\n\tlines \n"}]
    kept = "{% for m in messages %}\n    <{{ m.content }}>\n{% endfor %}"
    assert ChatTemplate(kept).render(messages) == "    <\n  two\n\n\tlines \n>\n"
    assert ChatTemplate(kept.replace("m.content", "m.content | trim")).render(messages) == "    <two\n\n\tlines>\n"


def test_a_template_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A template of 30 kB takes tens of milliseconds to compile, which would be paid by every answer's first token."""
    from roundexport.runtime import template_sandbox as module

    compiled: list[str] = []

    def count(source: str, real: Any = module.compile_template) -> Any:
        compiled.append(source)
        return real(source)

    monkeypatch.setattr(module, "compile_template", count)
    branch = "{% if messages[0].role == 'r@' %}{{ messages[0].content | trim }}{% endif %}\n"
    template = ChatTemplate("".join(branch.replace("@", str(i)) for i in range(400)) + "{{ messages[0].content }}")
    assert {template.render(USER).strip() for _ in range(100)} == {"Grüße"}
    assert len(compiled) == 1 and len(compiled[0]) > 25_000


def test_the_file_goes_before_the_config_and_tools_have_their_own() -> None:
    def shown(jinja_file: str | None, config: Any, tools: object = None) -> str:
        return choose(read_templates(jinja_file, {"chat_template": config}, "c.json"), tools).render(USER)

    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    assert [shown("file", "config"), shown("file", None), shown(None, "config")] == ["file", "file", "config"]
    assert [shown(None, named), shown(None, named, []), shown("file", named)] == ["plain", "tools", "file"]
    with pytest.raises(UsageError, match="chat templates are rag, tool_use; none is called default"):
        shown(None, [{"name": "rag", "template": ""}, named[0]])
    with pytest.raises(ArtifactError, match=r"c\.json: chat_template must be"):
        read_templates(None, {"chat_template": [{"name": 3, "template": ""}]}, "c.json")
