"""Templates keep track of who wrote what, whatever they do with it, and run as in `transformers`."""

from __future__ import annotations

from typing import Any

import pytest

from moe_lm.common.errors import UsageError
from moe_lm.tokenizer.chat.template import BY_TEMPLATE, BY_TOOLS, ChatTemplate

ASKED = {"role": "user", "content": "  one\ntwo  "}
ANSWERED = {"role": "assistant", "content": "three"}
CALL = {"id": "1", "function": {"name": "f", "arguments": {"x": 1, "y": "zed"}}}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}


def written(template: str, *messages: dict[str, Any], tools: Any = ()) -> tuple[str, str]:
    """The text, and of each character the number of its message, T for the tools and . for the template."""
    rendering = ChatTemplate(template, {}).render(messages, tools)
    names = {BY_TEMPLATE: ".", BY_TOOLS: "T"}
    return rendering.text, "".join(names.get(number, str(number)) for number in rendering.authors.tolist())


@pytest.mark.parametrize(
    ("expression", "text", "authors"),
    [
        ("said", "  one\ntwo  ", "0" * 11),
        ("said | trim", "one\ntwo", "0" * 7),
        ("said.strip().split('\\n')[-1]", "two", "000"),
        ("'<' ~ said | trim ~ '>'", "<one\ntwo>", "." + "0" * 7 + "."),
        ("'<' + said.strip() + '>'", "<one\ntwo>", "." + "0" * 7 + "."),
        ("[said.strip(), 'x'] | join('-')", "one\ntwo-x", "0" * 7 + ".."),
        ("'-'.join(said.split())", "one-two", "000.000"),
        ("said.replace('\\n', '; ') | trim", "one; two", "0" * 8),
        ("said | upper | trim", "ONE\nTWO", "0" * 7),
        ("said | safe", "  one\ntwo  ", "0" * 11),
        ("said | tojson", '"  one\\ntwo  "', "0" * 14),
        ("{'a': said.strip(), 'é<': 1} | tojson", '{"a": "one\\ntwo", "é<": 1}', "0" * 26),
        ("messages | map(attribute='content') | map('trim') | join(', ')", "one\ntwo, three", "0" * 7 + ".." + "1" * 5),
        # Where authors cannot be followed, all is by the first.
        ("'<{}>'.format(said.strip())", "<one\ntwo>", "0" * 9),
        ("'<%s>' % said.strip()", "<one\ntwo>", "0" * 9),
        ("'<%s>' | format(said.strip())", "<one\ntwo>", "0" * 9),
        ("said.strip() | indent(2)", "one\n  two", "0" * 9),
        ("said.strip() | center(9)", " one\ntwo ", "0" * 9),
        ("'x' | replace('x', said.strip())", "one\ntwo", "0" * 7),
    ],
)
def test_an_expression_keeps_the_authors(expression: str, text: str, authors: str) -> None:
    template = "{% set said = messages[0].content %}{{ " + expression + " }}|{{ messages[1].content }}"
    assert written(template, ASKED, ANSWERED) == (f"{text}|three", f"{authors}.11111")


def test_statements_keep_the_authors() -> None:
    template = (
        "{%- macro quote(text) %}<{{ text }}>{% endmacro %}\n"
        "{%- set block %}[{{ messages[0].content | trim }}]{% endset %}\n"
        "{%- for message in messages %}{% if message.role == 'user' %}{% continue %}{% endif %}\n"
        "{{- quote(message.content) }}{% endfor %}{{ block }}"
        "{% filter upper %}{{ messages[1].content }}{% endfilter %}"
        "{% set ns = namespace(x=messages[1].content) %}{{ ns.x }}"
    )
    authors = ".11111.." + "0" * 7 + ".1111111111"
    assert written(template, ASKED, ANSWERED) == ("<three>[one\ntwo]THREEthree", authors)


def test_calls_and_tools_have_authors() -> None:
    template = (
        "{% for tool in tools %}{{ tool | tojson }}{% endfor %};{{ messages[0].content | trim }};"
        "{% for call in messages[1].tool_calls %}{{ call.function.name ~ call.function.arguments.y }}{% endfor %}"
    )
    tool = {"function": {"name": "f"}}
    assert written(template, ASKED, CALLED, tools=[tool]) == (
        '{"function": {"name": "f"}};one\ntwo;fzed',
        "T" * 27 + "." + "0" * 7 + "." + "1111",
    )


@pytest.mark.parametrize(
    "expression",
    ["arguments | tojson", "'' + arguments", "arguments + ''", "'' ~ arguments", "arguments", "arguments | string"],
)
def test_arguments_are_an_object_and_its_json(expression: str) -> None:
    template = "{% set arguments = messages[1].tool_calls[0].function.arguments %}{{ messages[0].content | trim }}{{ "
    text, authors = written(template + expression + " }}", ASKED, CALLED)
    assert text == 'one\ntwo{"x": 1, "y": "zed"}'
    assert authors == "0" * 7 + "1" * 20


@pytest.mark.parametrize("empty", [None, ""])
@pytest.mark.parametrize(
    "write",
    [
        "{{ message.content.strip() }}{{ message.tool_calls | tojson }}",
        "{% if message.content is none %}{{ message.tool_calls | tojson }}{% else %}{{ message.content }}{% endif %}",
    ],
)
def test_calls_without_text_suit_templates_that_expect_none(write: str, empty: str | None) -> None:
    template = "{{ messages[0].content }}{% set message = messages[1] %}" + write
    text, _ = written(template, ASKED, CALLED | {"content": empty})
    assert text.startswith('  one\ntwo  [{"id": "1"')


def test_reasoning_has_the_names_that_templates_give_it() -> None:
    for name in ("reasoning_content", "reasoning", "thinking"):
        template = "{{ messages[0].content | trim }}{{ messages[1]." + name + " }}{{ messages[1].content }}"
        text, authors = written(template, ASKED, ANSWERED | {"reasoning_content": "hm"})
        assert (text, authors) == ("one\ntwohmthree", "0" * 7 + "1" * 7)


def test_the_day_is_always_the_same() -> None:
    text, _ = written("{{ strftime_now('%d %b %Y') }}{{ messages[0].content | trim }}", ASKED)
    assert text == "26 Jul 2024one\ntwo"


def test_generation_blocks_mark_what_is_in_them() -> None:
    template = "{{ messages[0].content }}{% generation %}<{{ messages[1].content }}>{% endgeneration %}!"
    rendering = ChatTemplate(template, {}).render([ASKED, ANSWERED])
    assert rendering.generated is not None
    assert "".join("^" if generated else " " for generated in rendering.generated) == " " * 11 + "^" * 7 + " "
    assert ChatTemplate("{{ messages[0].content }}", {}).render([ASKED]).generated is None


@pytest.mark.parametrize(
    ("template", "messages", "reason"),
    [
        ("{{ messages[1].content }}", [ASKED, ANSWERED], "leaves out what the user says"),
        ("{{ messages[0].content }}", [ASKED, CALLED], "leaves out the tool calls"),
        ("{{ raise_exception('not so') }}", [ASKED], "chat template failed: not so"),
        ("{{ messages[0].content.nothing.at_all }}", [ASKED], "chat template failed: "),
        ("{{ 1 / 0 }}", [ASKED], "chat template failed: division by zero"),
        ("{{ ''.__class__.__mro__ }}", [ASKED], "chat template failed: access to attribute '__class__'"),
        ("{{ [].__class__.__mro__ }}", [ASKED], "chat template failed: access to attribute '__class__'"),
        ("{{ messages.append(1) }}", [ASKED], "chat template failed: "),
        ("x", [], "the conversation is empty"),
        ("x", [ASKED, {"role": "robot", "content": "x"}], "message 1: role 'robot' is unknown"),
        ("x", [{"content": "x"}], "message 0: role None is unknown"),
        ("x", [{"role": "user"}], r"message 0 \(user\): content is None; expected text"),
        ("x", [{"role": "user", "content": ["x"]}], r"content is \['x'\]; expected text"),
        ("x", [{"role": "user", "content": None}], r"message 0 \(user\): content is None; expected text"),
        ("x", [{"role": "assistant", "content": None}], r"message 0 \(assistant\): content is None; expected text"),
    ],
)
def test_what_a_template_or_a_conversation_lacks_is_said(template: str, messages: Any, reason: str) -> None:
    with pytest.raises(UsageError, match=reason) as caught:
        ChatTemplate(template, {}).render(messages)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("template", "reason"),
    [("{% for x in y %}", "Unexpected end of template"), ("{% for %}", "Expected an expression")],
)
def test_a_broken_template_is_refused_when_it_is_read(template: str, reason: str) -> None:
    with pytest.raises(UsageError, match=f"chat template failed: {reason}"):
        ChatTemplate(template, {})
