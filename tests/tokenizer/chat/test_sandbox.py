"""Foreign templates end within their limits of time and memory, whatever they try; ours needs no process."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from moe_lm.common.errors import UsageError
from moe_lm.tokenizer.chat import sandbox as sandbox_module
from moe_lm.tokenizer.chat import sandbox as the_process
from moe_lm.tokenizer.chat import template as user_of_it
from moe_lm.tokenizer.chat.sandbox import MOST_CHARACTERS, Sandbox, SandboxError, forked
from moe_lm.tokenizer.chat.template import ChatTemplate
from moe_lm.tokenizer.chat.writing import Conversation
from moe_lm.tokenizer.tokenizer import Tokenizer

ASKED = {"role": "user", "content": "one\ntwo"}
SAID = Conversation([ASKED], [], False, {})
LARGE = "more than 512 MiB of memory"
LONG = "more than 0.3 s of processor time, or never ends"
DOUBLED = "{%% set n = namespace(x=%s, y=%s) %%}{%% for i in range(90) %%}{%% set n.x = %s %%}{%% endfor %%}"
NESTED = (
    "{% set n = namespace(x=[1], y=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% set n.y = [n.y, n.y] %}"
)

PAYLOADS = [
    ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", LONG),
    ("{{ lipsum(10**9) }}", LONG),
    ("{{ (('9' * 10**7) | int(base=16)) ** 10 }}", LONG),
    (NESTED + "{% endfor %}{{ n.x }}", f"{LONG}|{LARGE}"),
    (NESTED + "{% endfor %}{{ n.x == n.y }}", LONG),
    (NESTED + "{% endfor %}{{ n.x | tojson }}", f"{LONG}|{LARGE}"),
    ("{{ 'a' * 10**10 }}", LARGE),
    ("{% set k = 10**10 %}{{ 'a' * k }}", LARGE),
    ("{{ [1] * 10**10 }}", LARGE),
    (DOUBLED % ("'ab'", "1", "n.x ~ n.x"), f"{LARGE}|{LONG}"),
    (DOUBLED % ("[1]", "1", "n.x + n.x"), f"{LARGE}|{LONG}"),
    (DOUBLED % ("'ab'", "1", "n.x | replace('b', 'bb' * 9999)"), f"{LARGE}|{LONG}"),
    ("{{ messages[0].content.replace('o', 'o' * 10**10) }}", LARGE),
    ("{% set x = dict() %}{{ dict(a=[0] * 10**10) }}", LARGE),
    ("{{ range(99999) | map('string') | join('x' * 99999) }}", f"{LARGE}|{LONG}"),
    ("{{ '%10000000000d' % 1 }}", f"{LARGE}|too big"),
    ("{{ '%1000000000d' | format(1) }}", LARGE),
    ("{{ '{:1000000000}'.format(1) }}", LARGE),
    ("{{ 'a'.center(10**10) }}", LARGE),
    ("{{ 'a' | center(10**10) }}", LARGE),
    ("{{ 'a' | indent(10**10) }}", LARGE),
    ("{{ ('a' * 10**6).replace('a', 'b' * 10**6) }}", f"{LARGE}|{LONG}"),
    ("{{ messages | tojson(indent=10**10) }}", f"{LARGE}|cannot fit"),
    ("{{ [1] | batch(10**10, 1) | list }}", LARGE),
    ("{{ [1] | slice(10**10) | list }}", f"{LARGE}|{LONG}"),
    (f"{{{{ 'a' * {MOST_CHARACTERS + 1} }}}}", f"writes {MOST_CHARACTERS + 8} characters, expected at most"),
    ("{% macro f(x) %}{{ f(x) }}{{ f(x) }}{% endmacro %}{{ f(1) }}", "maximum recursion depth exceeded"),
    ("{{" + "(" * 5000 + "1" + ")" * 5000 + "}}", "maximum recursion depth exceeded"),
    ("{% if 1 %}" * 3000 + "{% endif %}" * 3000, "maximum recursion depth exceeded"),
    ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
]


@pytest.fixture(scope="module")
def impatient() -> Iterator[Sandbox]:
    """A sandbox with less time, so that the tests take less, also when its limits fail."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(the_process, "PATIENCE", 30)
        yield (sandbox := Sandbox(seconds=0.3))
    sandbox._end()


@pytest.mark.parametrize(("payload", "said"), PAYLOADS)
def test_what_takes_long_or_much_is_refused(
    payload: str, said: str, impatient: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(user_of_it, "sandbox", lambda: impatient)
    with pytest.raises(UsageError, match=f"^the tokenizer's chat template failed: .*({said})"):
        ChatTemplate(payload + "{{ messages[0].content }}", {}).render([ASKED])
    assert ChatTemplate("<{{ messages[0].content }}>", {}).render([ASKED]).text == "<one\ntwo>"


@pytest.mark.parametrize(
    "filters", ["wordwrap(2)", "striptags", "urlize", "pprint", "title", "string | list | last", "forceescape"]
)
def test_filters_work_although_nothing_can_be_imported_any_more(filters: str) -> None:
    text = ChatTemplate("{{ messages[0].content }}{{ '<b>http://a.b' | " + filters + " }}", {}).render([ASKED]).text
    assert len(text) > len("one\ntwo")


def test_the_process_can_open_and_start_nothing() -> None:
    program = (
        "import os, socket\nfrom moe_lm.tokenizer.chat.sandbox import _confine\n_confine()\n"
        "for attempt in (lambda: open('/etc/hostname'), socket.socket, os.pipe):\n"
        "    try:\n        attempt()\n    except OSError as error:\n        print(error.strerror)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["Too many open files"] * 3, done.stderr


@pytest.mark.parametrize(
    ("render", "said"),
    [
        (lambda: time.sleep(60), r"more than 1 s of processor time, 0\.5 s in all, or 512 MiB"),
        (lambda: os.close(os.open("/etc/hostname", os.O_RDONLY)), "Too many open files"),
    ],
    ids=["waits", "opens a file"],
)
def test_another_program_renders_within_the_same_limits(
    render: Callable[[], str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox_module, "PATIENCE", 0.5)
    begun = time.monotonic()
    with pytest.raises(SandboxError, match=said):
        forked(render)
    assert time.monotonic() - begun < 30
    monkeypatch.setattr(sandbox_module, "PATIENCE", 60)
    assert forked(lambda: "text") == "text"


def test_threads_share_it_and_get_their_own_answers() -> None:
    template = ChatTemplate("{% for i in range(300) %}{% endfor %}{{ messages[0].content }}", {})

    def answer(number: int) -> str:
        return template.render([{"role": "user", "content": f"number {number}"}]).text

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(answer, range(100))) == [f"number {number}" for number in range(100)]


def test_an_interrupted_request_leaves_no_answer_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    sandbox = Sandbox()
    sandbox.check({"default": ""})

    def interrupted(_: float) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sandbox._connection, "poll", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sandbox.write({"default": "first"}, SAID)
    assert sandbox.write({"default": "second"}, SAID) == "second"
    sandbox._end()


@pytest.mark.parametrize("text", ["\ud83d\ude00", "\ud800", "\0", "é😀", "a" * 100_000])
def test_every_text_arrives_as_it_was_sent(text: str) -> None:
    """Halves of surrogate pairs too, side by side."""
    rendering = ChatTemplate("<{{ messages[0].content }}>", {}).render([{"role": "user", "content": text}])
    assert rendering.text == f"<{text}>"
    assert rendering.authors.tolist()[1:-1] == [0] * len(text)


def test_our_own_template_needs_no_process(monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: Tokenizer) -> None:
    def refuse() -> Any:
        raise AssertionError

    monkeypatch.setattr(user_of_it, "sandbox", refuse)
    tokenizer = Tokenizer(tiny_tokenizer._backend, tiny_tokenizer._config)
    assert tokenizer.render_chat([ASKED])
    with pytest.raises(AssertionError):
        Tokenizer(tiny_tokenizer._backend, tiny_tokenizer._config | {"chat_template": "{{ messages }}"}).render_chat(
            [ASKED]
        )


@pytest.mark.parametrize(
    "source", [[1], [{"name": "default"}], [{"name": 1, "template": "x"}], [{"name": "default", "template": None}]]
)
def test_templates_of_another_form_are_refused(source: Any) -> None:
    with pytest.raises(UsageError, match="chat templates are not a list of names and templates"):
        ChatTemplate(source, {})


def test_nothing_is_imported_from_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which may be a stranger's."""
    (tmp_path / "jinja2.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')\nraise ImportError")
    monkeypatch.chdir(tmp_path)
    sandbox = Sandbox()
    assert sandbox.write({"default": "text"}, SAID) == "text"
    assert not (tmp_path / "run").exists()
    sandbox._end()
