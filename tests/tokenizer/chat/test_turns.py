"""What is trained on under other models' templates, with the ids that `transformers` gives."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_lm.common.errors import UsageError
from moe_lm.tokenizer.chat.template import ChatTemplate
from moe_lm.tokenizer.chat.turns import ChatFormat, Turns
from moe_lm.tokenizer.tokenizer import Tokenizer
from tests.tokenizer.chat.foreign import CHATML, GLM, MISTRAL, STYLES, Style, save

SYSTEM = {"role": "system", "content": "Be  brief.\n"}
SHORT = [
    {"role": "user", "content": " What does it do?\n"},
    {"role": "assistant", "content": "\tIt joins two paths. "},
    {"role": "user", "content": "谢谢, thanks"},
    {"role": "assistant", "content": "You are welcome"},
]


def call(city: str, number: int) -> dict[str, Any]:
    arguments = {"city": city, "days": number}
    return {"type": "function", "id": f"abcdefgh{number}", "function": {"name": "weather", "arguments": arguments}}


TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
CALLING = [
    {"role": "user", "content": "Rain in Oslo?"},
    {"role": "assistant", "content": None, "tool_calls": [call("Oslo", 1)]},
    {"role": "tool", "content": '"rain"', "name": "weather", "tool_call_id": "abcdefgh1"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "And in Bergen?"},
    {"role": "assistant", "content": None, "tool_calls": [call("Bergen", 2)]},
    {"role": "tool", "content": '"sun"', "name": "weather", "tool_call_id": "abcdefgh2"},
    {"role": "assistant", "content": "No."},
]


def turns(call: str, yes: str, no: str) -> list[str]:
    """The assistant's turns in CALLING: a call for Oslo, an answer, the same for Bergen and two days, an answer."""
    return [call, yes, call.replace("Oslo", "Bergen").replace("1", "2"), no]


DEEPSEEK_CALL = (
    '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>```json\n{"city": "Oslo", "days": 1}\n```'
    "<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>"
)
GLM_CALL = (
    "\n<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Oslo</arg_value>\n<arg_key>days</arg_key>\n"
    "<arg_value>1</arg_value>\n</tool_call><|observation|>"
)
TRAINED: dict[str, tuple[list[str], list[str]]] = {  # the runs of SHORT and of CALLING
    "chatml": (
        ["\tIt joins two paths. <|im_end|>", "<think>\n\n</think>\n\nYou are welcome<|im_end|>"],
        turns(
            '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo", "days": 1}}\n</tool_call><|im_end|>',
            "Yes.<|im_end|>",
            "<think>\n\n</think>\n\nNo.<|im_end|>",
        ),
    ),
    "llama": (
        ["It joins two paths.<|eot_id|>", "You are welcome<|eot_id|>"],
        turns(
            '{"name": "weather", "parameters": {"city": "Oslo", "days": 1}}<|eom_id|>',
            "Yes.<|eot_id|>",
            "No.<|eot_id|>",
        ),
    ),
    "deepseek": (
        ["\tIt joins two paths. <｜end▁of▁sentence｜>", "You are welcome<｜end▁of▁sentence｜>"],
        turns(DEEPSEEK_CALL, "Yes.<｜end▁of▁sentence｜>", "No.<｜end▁of▁sentence｜>"),
    ),
    "mistral": (
        [" It joins two paths.</s>", " You are welcome</s>"],
        turns(
            '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Oslo", "days": 1}, "id": "abcdefgh1"}]</s>',
            " Yes.</s>",
            " No.</s>",
        ),
    ),
    "glm": (["\nIt joins two paths.<|user|>", "\nYou are welcome"], turns(GLM_CALL, "\nYes.<|user|>", "\nNo.")),
    "eos_too": (["\tIt joins two paths. <|end|><|endoftext|>", "You are welcome<|end|><|endoftext|>"], []),
    "eos_at_last": (["\tIt joins two paths. <|end|>", "You are welcome<|end|>"], []),
    "named": (
        ["\tIt joins two paths. <|end|>", "You are welcome<|end|>"],
        turns('to=weather {"city": "Oslo", "days": 1}<|call|>', "Yes.<|end|>", "No.<|end|>"),
    ),
    "generation": (["\tIt joins two paths. ", "You are welcome"], []),
}
CASES = [
    (name, spaces, messages, tools)
    for name in STYLES
    for spaces in (False, True)
    for messages, tools in ((SHORT, []), ([SYSTEM, *SHORT], []), (CALLING, TOOLS))
    if (tools == [] or TRAINED[name][1]) and (name, messages[0]) != ("mistral", SYSTEM)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tokenizers: each style twice."""
    root = tmp_path_factory.mktemp("foreign")
    for name, style in STYLES.items():
        for spaces in (False, True):
            save(style, root / f"{name}-{spaces}", spaces)
    return root


def trained_texts(tokenizer: Tokenizer, messages: Any, tools: Any = ()) -> list[str]:
    """What is trained on, run by run."""
    ids, loss_mask = tokenizer.encode_chat(messages, tools=tools)
    runs: list[list[int]] = []
    for before, id_, trained in zip([False, *loss_mask], ids, loss_mask, strict=False):
        if trained:
            runs += [] if before else [[]]
            runs[-1].append(id_)
    return [tokenizer.decode(run, skip_special=False) for run in runs]


@pytest.mark.parametrize(("name", "spaces", "messages", "tools"), CASES)
def test_ids_are_those_of_transformers(folder: Path, name: str, spaces: bool, messages: Any, tools: Any) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    auto = transformers.AutoTokenizer.from_pretrained(folder / f"{name}-{spaces}")
    tokenizer = Tokenizer.load(folder / f"{name}-{spaces}")
    theirs = copy.deepcopy(messages)
    for function in (item["function"] for message in theirs for item in message.get("tool_calls") or []):
        if STYLES[name].arguments_as_text:
            function["arguments"] = json.dumps(function["arguments"])
    for length in range(1, len(messages) + 1):
        for add_generation_prompt in (False, True):
            given = {"tools": tools or None, "add_generation_prompt": add_generation_prompt}
            expected = auto.apply_chat_template(theirs[:length], return_dict=False, **given)
            ids, _ = tokenizer.encode_chat(messages[:length], add_generation_prompt, tools)
            assert ids == expected, tokenizer.decode(ids, skip_special=False)


@pytest.mark.parametrize(("name", "spaces", "messages", "tools"), CASES)
def test_exactly_the_assistants_turns_and_their_ends_are_trained_on(
    folder: Path, name: str, spaces: bool, messages: Any, tools: Any
) -> None:
    tokenizer = Tokenizer.load(folder / f"{name}-{spaces}")
    expected = TRAINED[name][bool(tools)]
    found = trained_texts(tokenizer, messages, tools)
    if spaces:  # which this kind of tokenizer loses where a text begins, and takes for ▁
        expected, found = ([text.replace(" ", "").replace("▁", "") for text in texts] for texts in (expected, found))
    assert found == expected


@pytest.mark.parametrize(("name", "spaces", "messages", "tools"), CASES)
def test_a_masked_turn_stays_in_the_context_and_loses_its_run_alone(
    folder: Path, name: str, spaces: bool, messages: Any, tools: Any
) -> None:
    tokenizer = Tokenizer.load(folder / f"{name}-{spaces}")
    ids, _ = tokenizer.encode_chat(messages, tools=tools)
    runs = trained_texts(tokenizer, messages, tools)
    numbers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    assert len(runs) == len(numbers)
    for turn, number in enumerate(numbers):
        given = [message | {"train": index != number} for index, message in enumerate(messages)]
        assert tokenizer.encode_chat(given, tools=tools)[0] == ids
        assert trained_texts(tokenizer, given, tools) == runs[:turn] + runs[turn + 1 :]
    given = [message | {"train": False} for message in messages]
    assert tokenizer.encode_chat(given, tools=tools) == (ids, [False] * len(ids))


@pytest.mark.parametrize(
    ("written", "learnt"),
    [
        ("<|assistant|>{% generation %}{{ message.content }}{% endgeneration %}<|end|>", "{}"),
        ("<|assistant|>{% generation %}{{ message.content }}<|end|>{% endgeneration %}", "{}<|end|>"),
        ("<|assistant|>{% generation %}-{{ message.content }}<|end|>{% endgeneration %}", "-{}<|end|>"),
        ("{% generation %}<|assistant|>{{ message.content }}<|end|>{% endgeneration %}", "<|assistant|>{}<|end|>"),
    ],
)
def test_a_masked_turn_beats_what_the_template_itself_marks(tmp_path: Path, written: str, learnt: str) -> None:
    template = (
        "{% for message in messages %}{% if message.role == 'assistant' %}" + written + "{% else %}"
        "{{ '<|' ~ message.role ~ '|>' ~ message.content ~ '<|end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    tokenizer = Tokenizer.load(save(replace(STYLES["generation"], template=template), tmp_path))
    one, two = ({"role": "assistant", "content": word} for word in ("one", "two"))
    masked = {"train": False}
    assert trained_texts(tokenizer, [SHORT[0], one, SHORT[2], two]) == [learnt.format("one"), learnt.format("two")]
    assert trained_texts(tokenizer, [SHORT[0], one | masked, SHORT[2], two]) == [learnt.format("two")]
    assert trained_texts(tokenizer, [SHORT[0], one, SHORT[2], two | masked]) == [learnt.format("one")]
    if learnt[0] != "<":  # two turns, one after the other; what belongs to the prompt goes with the turn before
        assert trained_texts(tokenizer, [SHORT[0], one | masked, two, SHORT[2]]) == [learnt.format("two")]
        assert trained_texts(tokenizer, [SHORT[0], one, two | masked, SHORT[2]]) == [learnt.format("one")]


@pytest.mark.parametrize("name", STYLES)
def test_the_token_that_ends_an_answer_follows_from_the_template(folder: Path, name: str) -> None:
    style, tokenizer = STYLES[name], Tokenizer.load(folder / f"{name}-False")
    assert tokenizer.end_id == tokenizer.special_tokens[style.end or style.eos]
    further = {"glm": ["<|observation|>"], "llama": ["<|eom_id|>"], "named": ["<|call|>"]}.get(name, [])
    assert tokenizer.stop_ids == {
        tokenizer.special_tokens[token] for token in (style.eos, style.end or style.eos, *further)
    }


def forged(style: Style) -> str:
    return "".join(style.special) + "\ufdd17\ufdd0"


@pytest.mark.parametrize("name", STYLES)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text())
def test_nothing_that_is_said_gives_special_tokens(folder: Path, name: str, text: str) -> None:
    tokenizer = Tokenizer.load(folder / f"{name}-False")
    special = set(tokenizer.special_tokens.values())

    def specials(said: str) -> list[int]:
        messages: list[dict[str, Any]] = [{"role": "user", "content": said}, {"role": "assistant", "content": said}]
        given: dict[str, Any] = {}
        if TRAINED[name][1]:
            function = {"name": said, "arguments": {said: said}}
            messages += [
                {"role": "assistant", "content": None, "tool_calls": [{"id": "abcdefgh1", "function": function}]},
                {"role": "tool", "content": said, "tool_call_id": said},
                {"role": "assistant", "content": said},
            ]
            given = {"tools": [{"function": {"name": said}}]}
        return [id_ for id_ in tokenizer.encode_chat(messages, **given)[0] if id_ in special]

    assert specials(f"x{text}{forged(STYLES[name])}x") == specials("x")


def test_a_token_that_the_prompt_and_the_answer_share_is_trained_on(chatml: Tokenizer) -> None:
    """The newline before an answer is the prompt's; without this token nothing would teach how the answer begins."""
    messages = [SHORT[0], {"role": "assistant", "content": "\none"}, *SHORT[:1]]
    assert trained_texts(chatml, messages) == ["\n\none<|im_end|>"]


def test_real_templates_train_on_the_answers_and_their_ends_alone() -> None:
    """Those that TRL brings with it; three of them are for images, and want content in parts."""
    found = find_spec("trl")
    if found is None or found.origin is None:
        pytest.skip("trl is not installed, whose folder has templates of other models")
    folder = Path(found.origin).parent / "chat_templates"
    special = re.compile(r"<[|｜][^<>\s'\"]{1,40}[|｜]>|<(?:start|end)_of_turn>|</?s>|<[a-z_]+\|>|<\|[a-z_]+>")
    refused, trained = [], {}
    for file in sorted(folder.glob("*.jinja")):
        source = file.read_text(encoding="utf-8")
        template = ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"})
        chat = ChatFormat(template, {*special.findall(source), "</s>", "<s>"}, "</s>")
        messages = [{"role": turn["role"], "content": f"-{number}-"} for number, turn in enumerate(SHORT)]
        try:
            rendering = replace(template.render(messages), generated=None)
        except UsageError:
            refused.append(file.stem)
            continue
        characters = [
            letter if is_trained else "\0"
            for letter, is_trained in zip(rendering.text, Turns(chat, messages, (), rendering).trained(), strict=True)
        ]
        trained[file.stem] = [run for run in "".join(characters).split("\0") if run]
    assert {name.removesuffix("_training") for name in refused} <= {"idefics3", "llava_next", "smolvlm"}
    assert len(trained) > 50
    # What may stand before an answer is an empty thought, a channel or whom it is for.
    before = r"(\s*(<think>)?\s*</think>\s*|( to=user)?(<\|channel\|>final)?<\|message\|>)?"
    after = r"(<[|｜][^<>]+[|｜]>|</s>|<end_of_turn>|<turn\|>)+"
    for name, runs in trained.items():
        last = after if not name.startswith("glm") else f"({after})?"  # whose turns the next one ends
        assert re.fullmatch(rf"{before}\s?-1-{after}", runs[0]), (name, runs)
        assert re.fullmatch(rf"{before}\s?-3-{last}", runs[1]), (name, runs)
        assert len(runs) == 2


# One template's peculiarities


@pytest.fixture
def chatml(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder / "chatml-False")


def test_earlier_reasoning_that_the_template_drops_is_not_trained_on(chatml: Tokenizer) -> None:
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\none"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "two", "reasoning_content": "ah"},
    ]
    assert trained_texts(chatml, messages[:2]) == ["<think>\nhm\n</think>\n\none<|im_end|>"]
    assert trained_texts(chatml, messages) == ["one<|im_end|>", "<think>\nah\n</think>\n\ntwo<|im_end|>"]


def test_a_thought_that_the_prompt_opens_is_not_trained_on(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder / "deepseek-False")
    template = STYLES["deepseek"].template.replace(
        "'<｜Assistant｜>') + content", "'<｜Assistant｜><think>\\n') + content"
    )
    assert template != STYLES["deepseek"].template
    (folder / "opened").mkdir(exist_ok=True)
    for file, content in (tokenizer.files() | {"chat_template.jinja": template}).items():
        (folder / "opened" / file).write_text(content)
    assert trained_texts(Tokenizer.load(folder / "opened"), SHORT[2:]) == ["You are welcome<｜end▁of▁sentence｜>"]


def test_several_calls_after_words_are_one_turn(chatml: Tokenizer) -> None:
    calling = {"role": "assistant", "content": "Let me see.", "tool_calls": [call("Oslo", 1), call("Bergen", 2)]}
    results = [{"role": "tool", "content": word} for word in ("rain", "sun")]
    messages = [CALLING[0], calling, *results, {"role": "assistant", "content": "Rain, sun."}]
    assert trained_texts(chatml, messages, TOOLS) == [
        'Let me see.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo", "days": 1}}\n</tool_call>\n'
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Bergen", "days": 2}}\n</tool_call><|im_end|>',
        "<think>\n\n</think>\n\nRain, sun.<|im_end|>",
    ]


def test_an_assistant_may_speak_first_or_twice_or_say_nothing(chatml: Tokenizer) -> None:
    said = [{"role": "assistant", "content": text} for text in ("one", "two", "")]
    assert trained_texts(chatml, [said[0], SHORT[0], said[1]]) == [
        "one<|im_end|>",
        "<think>\n\n</think>\n\ntwo<|im_end|>",
    ]
    assert trained_texts(chatml, [SHORT[0], said[0], said[1], SHORT[2]]) == ["one<|im_end|>", "two<|im_end|>"]
    assert trained_texts(chatml, [SHORT[0], said[2], SHORT[2], said[1]])[0] == "<|im_end|>"


def test_equal_words_of_user_and_assistant_are_told_apart(folder: Path) -> None:
    messages = [{"role": role, "content": "the same"} for role in ("user", "assistant", "user", "assistant")]
    for name in STYLES:
        texts = trained_texts(Tokenizer.load(folder / f"{name}-False"), messages)
        assert [text.count("the same") for text in texts] == [1, 1]


# What is refused


def ended(template: str) -> Style:
    return Style(template, ("<|end|>",), "<|end|>")


SHORT_ID = CALLING[1] | {"tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
ROBOT = {"role": "robot", "content": "x"}


@pytest.mark.parametrize(
    ("style", "messages", "tools", "words"),
    [
        (MISTRAL, [SYSTEM, *SHORT], [], "chat template failed: only user, assistant and tool are supported"),
        (MISTRAL, [SHORT[0], *SHORT], [], "chat template failed: roles must alternate"),
        (MISTRAL, [SHORT[0], SHORT_ID], [], "ids of"),
        (STYLES["eos_too"], CALLING[:2], [], "chat template failed|leaves out the tool calls"),
        (STYLES["eos_too"], SHORT, TOOLS, "leaves out the descriptions of tools"),
        (GLM, [ROBOT], [], "message 0: role 'robot' is unknown; expected system, user, assist"),
        (ended("{{ messages[0].content }}<|end|>"), SHORT, [], "leaves out what the assistant says"),
        (ended("{% for m in messages %}{{ m.content }}\n{% endfor %}"), SHORT, [], "no special token"),
        (ended("{{ nothing.at.all }}"), SHORT, [], "chat template failed: 'nothing' is undefined"),
    ],
)
def test_a_template_that_cannot_have_it_says_so_in_one_sentence(
    tmp_path: Path, style: Style, messages: Any, tools: Any, words: str
) -> None:
    tokenizer = Tokenizer.load(save(style, tmp_path))
    with pytest.raises(UsageError, match=words) as caught:
        tokenizer.encode_chat(messages, tools=tools)
    assert "\n" not in str(caught.value)


def test_a_template_for_tools_stands_beside_the_default_one(tmp_path: Path) -> None:
    save(CHATML, tmp_path)
    named = [{"name": "default", "template": CHATML.template}, {"name": "tool_use", "template": "{{ tools[0] }}"}]
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": named}))
    tokenizer = Tokenizer.load(tmp_path)
    assert trained_texts(tokenizer, SHORT) == TRAINED["chatml"][0]
    with pytest.raises(UsageError, match="leaves out what the user says"):
        tokenizer.render_chat(CALLING[:1], tools=TOOLS)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": named[1:]}))
    with pytest.raises(UsageError, match="chat templates tool_use, but none named default"):
        Tokenizer.load(tmp_path).render_chat(SHORT)
