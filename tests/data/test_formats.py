"""Rows of every format: what they become, and with which words the others are left out."""

from __future__ import annotations

import json
from typing import Any

import pytest

from moe_lm.config.data import ChatSource
from moe_lm.data.formats import Unusable, dialogue_of, preference_of
from tests.data.rows import assistant, user

PLAIN = ChatSource(path="x.jsonl")
ASKED, ANSWERED = user("q"), assistant("a")
CALL = {"name": "weather", "arguments": {"city": "Oslo"}}
CALLING = assistant(None, tool_calls=[{"type": "function", "function": CALL}])
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {}}}


def source(**settings: Any) -> ChatSource:
    return ChatSource(path="x.jsonl", **settings)


def messages(row: dict[str, Any], settings: ChatSource = PLAIN) -> list[dict[str, Any]]:
    return dialogue_of(row, settings).messages


def turns(*names: str) -> list[dict[str, str]]:
    """ShareGPT's messages: the name and one word."""
    return [{"from": name, "value": name} for name in names]


# Conversations


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"messages": [ASKED, ANSWERED]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, ANSWERED]}, "messages"),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "sharegpt"),
        ({"conversations": [ASKED, ANSWERED]}, "sharegpt"),
        ({"instruction": "q", "input": "", "output": "a"}, "alpaca"),
        ({"instruction": "q", "output": "a"}, "alpaca"),
        ({"prompt": "q", "completion": "a"}, "prompt_completion"),
        ({"prompt": [ASKED], "completion": [ANSWERED]}, "prompt_completion"),
        ({"prompt": [ASKED], "completion": "a"}, "prompt_completion"),
    ],
)
def test_every_format_gives_the_same_messages_named_or_detected(row: dict[str, Any], kind: Any) -> None:
    assert messages(row) == messages(row, source(format=kind)) == [ASKED, ANSWERED]


def test_an_instruction_and_its_input_are_one_question() -> None:
    row = {"instruction": "Correct this.", "input": "freind", "output": "friend"}
    assert messages(row)[0] == user("Correct this.\n\nfreind")


def test_names_of_roles() -> None:
    found = messages({"conversations": turns("system", "human", "gpt", "observation", "model", "function", "gpt")})
    assert [message["role"] for message in found] == "system user assistant tool assistant tool assistant".split()
    assert [message["content"] for message in found][:4] == ["system", "human", "gpt", "observation"]


def test_fields_may_have_other_names() -> None:
    settings = source(fields={"prompt": "question", "completion": "answer"})
    assert messages({"question": "q", "answer": "a", "prompt": "no"}, settings) == [ASKED, ANSWERED]
    with pytest.raises(Unusable, match=r"^no field 'question'$"):
        dialogue_of({"prompt": "q", "answer": "a"}, settings)


def test_a_prompt_template_is_filled_with_fields_of_the_row() -> None:
    settings = source(
        format="prompt_completion",
        fields={"completion": "modern"},
        prompt_template="Into {{modern}} Chinese, {style}: {classical}",
    )
    row = {"classical": "{学} 而时习之", "modern": "a", "style": "briefly"}
    assert messages(row, settings) == [user("Into {modern} Chinese, briefly: {学} 而时习之"), ANSWERED]
    with pytest.raises(Unusable, match="no text in field 'style', which prompt_template needs"):
        dialogue_of(row | {"style": 3}, settings)
    alpaca = source(format="alpaca", prompt_template="### {instruction}")
    assert messages({"instruction": "q", "output": "a"}, alpaca) == [user("### q"), ANSWERED]


def test_system_prompt_of_conversation_then_row_then_source() -> None:
    settings = source(system="of the source")
    own = {"role": "system", "content": "its own"}
    assert messages({"messages": [own, ASKED, ANSWERED], "system": "of the row"}, settings)[0] == own
    assert messages({"messages": [ASKED, ANSWERED], "system": "of the row"}, settings)[0]["content"] == "of the row"
    for empty in ({}, {"system": None}, {"system": ""}):
        row = {"messages": [ASKED, ANSWERED], **empty}
        assert messages(row, settings) == [{"role": "system", "content": "of the source"}, ASKED, ANSWERED]
        assert messages(row) == [ASKED, ANSWERED]


@pytest.mark.parametrize(
    "calling",
    [
        CALLING,
        {"role": "assistant", "content": None, "tool_calls": [{"function": CALL}]},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": [CALL | {"arguments": '{"city": "Oslo"}'}]},
        {"from": "function_call", "value": json.dumps(CALL)},
    ],
)
@pytest.mark.parametrize("tools", [[TOOL], [TOOL["function"]], json.dumps([TOOL])])
def test_tool_calls_in_their_many_forms(calling: dict[str, Any], tools: Any) -> None:
    result = {"role": "tool", "content": "rain", "name": "weather", "tool_call_id": "1"}
    dialogue = dialogue_of({"messages": [ASKED, calling, result, ANSWERED], "tools": tools}, PLAIN)
    assert dialogue.messages == [ASKED, CALLING, result, ANSWERED]
    assert dialogue.tools == [TOOL]


def test_the_id_of_a_call_and_what_the_assistant_thought_are_kept() -> None:
    call = {"id": "abc", "type": "function", "function": CALL}
    for name in ("reasoning_content", "reasoning", "thinking"):
        turn = assistant("a", tool_calls=[call], name=None) | {name: "hm"}
        expected = assistant("a", tool_calls=[call], reasoning_content="hm")
        assert messages({"messages": [ASKED, turn]})[1] == expected


@pytest.mark.parametrize(
    "mark", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"loss": False}, {"weight": 0, "train": False}]
)
def test_an_answer_may_be_masked(mark: dict[str, Any]) -> None:
    masked = {"train": False}
    expected = [ASKED, ANSWERED | masked, ASKED, ANSWERED]
    assert messages({"messages": [ASKED, ANSWERED | mark, ASKED, ANSWERED]}) == expected
    said = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"} | mark, *turns("human", "gpt")]
    assert [message.get("train") for message in messages({"conversations": said})] == [None, False, None, None]
    called = {"from": "function_call", "value": json.dumps(CALL)} | mark
    assert messages({"conversations": [ASKED, called, *turns("observation", "gpt")]})[1] == CALLING | masked
    assert messages({"prompt": [ASKED, ANSWERED | mark, ASKED], "completion": "a"}) == expected


@pytest.mark.parametrize(
    "mark", [{"weight": 1}, {"weight": 1.0}, {"train": True}, {"loss": True}, {"weight": 1, "train": True}]
)
def test_an_answer_that_is_not_masked_is_as_any_other(mark: dict[str, Any]) -> None:
    nothing = {"weight": None, "train": None}  # as Parquet fills up messages
    assert messages({"messages": [ASKED | nothing, ANSWERED | nothing | mark]}) == [ASKED, ANSWERED]


def test_masks_are_of_answers_alone() -> None:
    mark = {"weight": 0.5, "train": "?"}
    row = {"messages": [{"role": "system", "content": "s", **mark}, ASKED | mark, ANSWERED]}
    assert messages(row)[1:] == [ASKED, ANSWERED]


def test_the_history_of_an_instruction_goes_before_it() -> None:
    row = {"instruction": "q", "input": "", "output": "a", "history": [["one?", "1"], ["two?", "2"]]}
    expected = [user("one?"), assistant("1"), user("two?"), assistant("2"), ASKED, ANSWERED]
    assert messages(row) == messages(row, source(format="alpaca")) == expected
    renamed = {"instruction": "q", "output": "a", "before": row["history"]}
    assert messages(renamed, source(fields={"history": "before"})) == expected
    assert messages(row | {"system": "s"}) == [{"role": "system", "content": "s"}, *expected]
    template = source(format="alpaca", prompt_template="### {instruction}")
    assert messages(row, template) == [*expected[:-2], user("### q"), ANSWERED]
    for empty in ([], None, ""):
        assert messages(row | {"history": empty}) == [ASKED, ANSWERED]


def answered(**mask: Any) -> dict[str, Any]:
    return {"messages": [ASKED, ANSWERED | mask]}


def calling(*calls: Any) -> dict[str, Any]:
    return {"messages": [ASKED, CALLING | {"tool_calls": list(calls)}]}


def history(value: Any) -> dict[str, Any]:
    return {"instruction": "q", "output": "a", "history": value}


REFUSED: dict[str, list[dict[str, Any]]] = {
    "a message whose weight is neither 0 nor 1": [answered(weight=weight) for weight in (0.5, 2, -1, "0", True, [])],
    "a message whose train is neither true nor false": [answered(train=train) for train in (0, 1, "false", {})],
    "a message whose loss is neither true nor false": [answered(loss=0)],
    "a message whose train and loss contradict each other": [answered(train=True, loss=False)],
    "a message whose weight and train contradict each other": [answered(weight=1, train=False)],
    "every assistant message is masked by weight, train or loss": [
        {"messages": [ASKED, ANSWERED | {"weight": 0}, ASKED, ANSWERED | {"train": False}]},
        {"prompt": "q", "completion": ANSWERED | {"weight": 0}},
    ],
    "a history that is not a list of [question, answer]": [
        *map(history, ("x", 3, {"one?": "1"}, ["one?", "1"], [["one?"]], [["one?", "1", "2"]], [None]))
    ],
    "no messages, conversations, instruction with output, or prompt with completion": [{"text": "x"}],
    "a preference pair, which needs the section preference": [{"prompt": "q", "chosen": "a", "rejected": "b"}],
    "messages that are not a list": [{"conversations": "hello"}, {"messages": "hello"}],
    "no messages": [{"conversations": []}, {"messages": []}],
    "a message that is not an object": [{"conversations": [3]}, {"messages": ["hello"]}],
    "a message whose role is not one of system, user, assistant, tool": [
        {"conversations": turns("human", "bing")},
        {"messages": [{"role": "robot", "content": "a"}]},
        {"messages": [{"role": ["user"], "content": "a"}]},
    ],
    "a message whose content is not text": [
        history([["one?", 1]]),
        {"messages": [{"role": "user"}]},
        {"messages": [ASKED, {"role": "assistant"}]},
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        {"messages": [ASKED, ANSWERED], "system": 3},
        {"prompt": "q", "completion": None},
        {"instruction": "a", "output": None},
        {"instruction": None, "input": "a", "output": "b"},
    ],
    "no assistant message with text": [{"messages": [ASKED]}, {"prompt": "q", "completion": " \n"}],
    "an assistant message without text": [
        history([["one?", ""]]),
        {"messages": [ASKED, ANSWERED, ASKED, {**ANSWERED, "content": ""}]},
    ],
    "a tool call without the name of a function": [calling({})],
    "a tool call whose arguments are not a JSON object": [calling(CALL | {"arguments": "{"})],
    "tools that are not a list of objects": [{"messages": [ASKED, ANSWERED], "tools": "none"}],
    "NUL byte": [calling({"name": "x\0", "arguments": {}}), {"prompt": "q", "completion": "a\0b"}],
    "invalid UTF-8": [
        {"messages": [ASKED, ANSWERED], "tools": [{"name": "\ud800"}]},
        {"prompt": "q", "completion": "half a pair: \ud800"},
    ],
}


@pytest.mark.parametrize(("reason", "row"), [(reason, row) for reason, rows in REFUSED.items() for row in rows])
def test_a_row_without_a_conversation_is_unusable(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(Unusable) as caught:
        dialogue_of(row, PLAIN)
    assert str(caught.value) == reason


def test_a_named_format_is_not_guessed() -> None:
    with pytest.raises(Unusable, match="no field 'messages'"):
        dialogue_of({"instruction": "q", "output": "a"}, source(format="messages"))


# Preference pairs

WORSE = assistant("b")
SAID = {"from": "gpt", "value": "a"}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": [ASKED], "chosen": "a", "rejected": "b"},
        {"prompt": [ASKED], "chosen": [ANSWERED], "rejected": [WORSE]},
        {"prompt": "q", "chosen": [ASKED, ANSWERED], "rejected": [ASKED, WORSE]},
        {"chosen": [ASKED, ANSWERED], "rejected": [ASKED, WORSE]},
        {"messages": [ASKED], "chosen": ANSWERED, "rejected": WORSE},
        {"conversations": [{"from": "human", "value": "q"}], "chosen": SAID, "rejected": SAID | {"value": "b"}},
        {"instruction": "q", "input": "", "output": "a", "chosen": "a", "rejected": "b"},
    ],
)
@pytest.mark.parametrize("kind", ["auto", "preference"])
def test_every_form_of_a_pair_is_one_prompt_with_two_answers(row: dict[str, Any], kind: Any) -> None:
    pair = preference_of(row, source(format=kind))
    assert (pair.prompt, pair.chosen, pair.rejected) == ([ASKED], [ANSWERED], [WORSE])


def test_a_pair_may_share_several_turns() -> None:
    before = [ASKED, ANSWERED, user("q2")]
    whole = preference_of(
        {"chosen": [*before, ANSWERED], "rejected": [*before, WORSE]}, source(system="s", format="auto")
    )
    assert whole.prompt == [{"role": "system", "content": "s"}, *before]
    assert (whole.chosen, whole.rejected) == ([ANSWERED], [WORSE])


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"weight": 0.5}])
def test_masks_change_no_pair(mark: dict[str, Any]) -> None:
    before = [ASKED, ANSWERED, ASKED]
    marked = [message | mark for message in before]
    for row in (
        {"prompt": marked, "chosen": [ANSWERED | mark], "rejected": WORSE},
        {"prompt": marked, "chosen": ANSWERED | mark, "rejected": "b"},
        {"chosen": [*marked, ANSWERED], "rejected": [*before, WORSE | mark]},
    ):
        pair = preference_of(row, PLAIN)
        assert (pair.prompt, pair.chosen, pair.rejected) == (before, [ANSWERED], [WORSE])
    with pytest.raises(Unusable, match="equal sides"):
        preference_of({"prompt": "q", "chosen": ANSWERED, "rejected": ANSWERED | mark}, PLAIN)


@pytest.mark.parametrize("asked", [{"instruction": "q"}, {"prompt": "q"}])
def test_the_history_of_a_pair_goes_before_its_question(asked: dict[str, Any]) -> None:
    pair = preference_of({**asked, "chosen": "a", "rejected": "b", "history": [["one?", "1"]]}, PLAIN)
    assert pair.prompt == [user("one?"), assistant("1"), ASKED]


def test_a_pair_under_other_names_with_a_template() -> None:
    settings = source(
        format="preference", fields={"chosen": "good", "rejected": "bad"}, prompt_template="{topic}?", system=None
    )
    pair = preference_of({"topic": "q", "good": "a", "bad": "b"}, settings)
    assert (pair.prompt[0]["content"], pair.chosen, pair.rejected) == ("q?", [ANSWERED], [WORSE])


NO_QUESTION = "a preference pair whose sides share no question"
NO_ANSWER = "a side of a preference pair that is not an assistant's answer"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "a preference pair with equal sides"),
        ({"prompt": "q", "chosen": "a"}, "no field 'rejected'"),
        ({"prompt": "q", "chosen": "a", "rejected": " "}, "no assistant message with text"),
        ({"prompt": "q", "chosen": None, "rejected": "a"}, "a message whose content is not text"),
        ({"prompt": "q", "chosen": [], "rejected": "a"}, "no messages"),
        ({"chosen": "a", "rejected": "b"}, "no field 'prompt'"),
        ({"chosen": [ANSWERED], "rejected": [WORSE]}, "no field 'prompt'"),
        ({"prompt": [ANSWERED], "chosen": "a", "rejected": "b"}, NO_QUESTION),
        ({"chosen": [ASKED, ANSWERED], "rejected": [user("?"), WORSE]}, NO_QUESTION),
        ({"prompt": [ASKED], "chosen": [ANSWERED, ASKED], "rejected": "b"}, NO_ANSWER),
        ({"prompt": [{"role": "x"}], "chosen": "a", "rejected": "b"}, "a message whose role is not one of"),
    ],
)
def test_a_row_without_a_pair_is_unusable(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(Unusable) as caught:
        preference_of(row, PLAIN)
    assert str(caught.value).startswith(reason)


def test_pairs_are_not_read_from_sets_of_conversations() -> None:
    with pytest.raises(Unusable, match="format=alpaca is not a preference pair"):
        preference_of({"prompt": "q", "chosen": "a", "rejected": "b"}, source(format="alpaca"))
