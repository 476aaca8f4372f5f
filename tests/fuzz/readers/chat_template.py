"""A chat template: it writes a conversation, fails, or is stopped, and the process that uses it stays as it was."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random

from moe_lm.tokenizer.chat.sandbox import MEMORY, SECONDS
from moe_lm.tokenizer.chat.template import ChatTemplate, own_template
from tests.fuzz.frame import Read, Reader
from tests.fuzz.mutations import mutate_bytes
from tests.tokenizer.chat.foreign import STYLES

CALL = {"type": "function", "id": "abcdefghi", "function": {"name": "f", "arguments": {"x": 1, "y": ["é", None]}}}
MESSAGES = [
    {"role": "user", "content": "one\n two <|end|> é"},
    {"role": "assistant", "content": "three", "reasoning_content": "hm"},
    {"role": "user", "content": " "},
    {"role": "assistant", "content": "four"},
]
NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
WORDS = """
{% for m in messages %} {% endfor %} {% if x %} {% endif %} {% else %} {% macro f(x) %} {% endmacro %} {{ f(1) }}
{% set x = messages %} {% generation %} {% endgeneration %} {% set ns = namespace(x=1) %} {% set ns.x = ns.x ~ ns.x %}
{% for i in range(99999) %} {{ 'a' * 10**10 }} {{ 10**9**9 }} {{ messages|tojson(indent=4) }} {{ messages[0].content }}
{{ self }} {{ caller() }} {% call f() %} {% endcall %} {% filter upper %} {% endfilter %} {% raw %} {% endraw %} {{ x|
[::-1] [0] .content .role |trim |join |list |map('upper') |batch(9) |replace('a','b') .split() .replace('a', 'bb') ** ~
|format(1) '%s' % x |length loop.index loop.last raise_exception('no') strftime_now('%Y') lipsum(99) |indent |sort |sum
""".split(" ")


def prepare(folder: Path) -> Read:
    def read(data: bytes) -> None:
        template = ChatTemplate(data.decode("utf-8", "replace"), NAMES)
        template.render(MESSAGES, add_generation_prompt=True)

    return read


def seeds() -> list[bytes]:
    """Foreign templates of the tests that take this conversation, and a change of ours."""
    found = [own_template() + " "]
    for style in STYLES.values():
        try:
            ChatTemplate(style.template, NAMES).render(MESSAGES, add_generation_prompt=True)
        except ValueError:
            continue
        found.append(style.template)
    return [text.encode() for text in found]


def mutate(draw: Random, data: bytes, seeds: Sequence[bytes]) -> bytes:
    if draw.randrange(2):
        return mutate_bytes(draw, data, seeds)
    begin = draw.randrange(len(data) + 1)
    return data[:begin] + " ".join(draw.choices(WORDS, k=draw.choice((1, 2, 8)))).encode() + data[begin:]


# Its process has a second of processor time and MEMORY for a template, and a new one takes a while to start.
READER = Reader(
    "chat-template", prepare, seeds, mutate, seconds=6.0 * SECONDS, memory=MEMORY + (128 << 20), inputs_in_ci=50
)
