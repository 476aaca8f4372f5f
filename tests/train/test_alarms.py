"""Alarms: runs that are sick on purpose are named with their cure, healthy ones left alone; the table of symptoms."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from moe_lm.common.errors import MoeLmError
from moe_lm.config.training import TrainConfig
from moe_lm.tools.report.reading import read_run
from moe_lm.tools.report.words import points, verdict
from moe_lm.train.alarms import REMIND, Alarms
from moe_lm.train.past import Plan
from moe_lm.train.symptoms import SYMPTOMS
from tests.processes import events, metrics
from tests.sick import HEALTHY, SICK, run_of
from tests.tiny import tiny

pytestmark = pytest.mark.usefixtures("one_thread")
Record = dict[str, Any]
MoeLm = Callable[..., Any]  # the fixture `moe_lm`


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "creeping memory" else ()) for name in SICK]
)
def test_a_sick_run_is_named_with_its_cure(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    sick = SICK[name]
    run = run_of(sick, tmp_path)
    with pytest.raises(MoeLmError, match="stopped at step") if sick.stops else nullcontext():
        run()
    (alarm,) = events(tmp_path, "alarm")
    assert (alarm["symptom"], alarm["step"] <= sick.within) == (sick.symptom, True)
    assert sick.cure in alarm["message"]
    assert alarm["message"] in capsys.readouterr().out
    if "router" in alarm["symptom"] or "experts" in alarm["symptom"]:
        assert [found["layer"] for found in alarm["found"]] == [2]  # as the model counts, dense layers too
    again = Alarms(run.plan)
    assert [(found.step, found.text) for line in metrics(tmp_path) for found in again.after(line)] == [
        (alarm["step"], alarm["message"])
    ]
    point, *others = points(read_run(tmp_path))  # the report of the run says the same
    assert f"{point.title}: {point.said} {point.cure}".lower() == alarm["message"].lower()
    assert [other.title for other in others] == (["The run gave up"] if sick.stops else [])


def test_a_healthy_run_has_no_alarm(tmp_path: Path) -> None:
    run_of(HEALTHY, tmp_path, steps=40, schedule={"warmup_steps": 5})()
    assert events(tmp_path, "alarm") == []
    run = read_run(tmp_path)
    assert verdict(run, points(run)) == f"Nothing looks wrong: none of the {len(SYMPTOMS)} symptoms showed in 40 steps."


def test_settings_are_judged_before_the_first_step(tmp_path: Path, tiny_pretrain: Path, moe_lm: MoeLm) -> None:
    pretrain = ("pretrain", tiny_pretrain, "train.schedule.warmup_steps=5")
    longer = ("train.steps=3", "checkpoint.allow_changes=true")
    assert moe_lm(*pretrain, f"run_dir={tmp_path / 'run'}", "train.steps=2").code == 0
    assert moe_lm(*pretrain, f"run_dir={tmp_path / 'run'}", *longer).code == 0
    assert moe_lm(*pretrain, f"run_dir={tmp_path / 'off'}", "train.steps=2", "log.alarms=false").code == 0
    found = [(alarm["step"], alarm["symptom"]) for alarm in events(tmp_path / "run", "alarm")]
    assert found == [(0, "warm-up too long"), (2, "warm-up too long")]
    assert events(tmp_path / "off", "alarm") == []


# The table, on records


def plan(fresh: bool = True, epochs: dict[str, float] | None = None, finetuning: bool = False, **train: Any) -> Plan:
    """A run of 2000 steps; layer 0 is dense, layers 1 and 2 have 8 experts, of which a token uses 3."""
    settings: dict[str, Any] = {"steps": 2000, "global_batch_size": 4, "schedule": {"warmup_steps": 10}} | train
    return Plan(TrainConfig(**settings), tiny(), fresh, epochs or {}, finetuning)


def healthy(step: int) -> Record:
    """The record of a step with nothing to say about."""
    layer = {"max_violation": 0.3, "entropy": 0.98, "dead_share": 0.0}
    return {
        "step": step, "loss": 4 - step / 1000 + step % 7 / 50, "lr": 3e-4, "grad_norm": 0.5, "tokens": 200,
        "seconds": 0.1, "data_seconds": 0.001, "skipped": False, "experts": [layer, layer],
        "host_bytes": 2**30 + step % 5 * 2**20,
    }  # fmt: skip


def said(records: Iterable[Record], **run: Any) -> list[tuple[int, str]]:
    """The step and the name of every alarm."""
    alarms = Alarms(plan(**run))
    return [(alarm.step, alarm.symptom.name) for record in records for alarm in alarms.after(record)]


def changed(steps: int, change: Callable[[int], Record]) -> Iterator[Record]:
    """Healthy records with other figures; those of `layer` are the second MoE layer's."""
    for step in range(1, steps + 1):
        figures = change(step)
        record = healthy(step)
        record["experts"] = [record["experts"][0], record["experts"][1] | figures.pop("layer", {})]
        yield record | figures


def uneven(used: float) -> Record:
    """A layer whose load lies on `used` of 8 experts, by its entropy."""
    return {"layer": {"entropy": math.log(used, 8), "max_violation": 8 / used - 1}}


def without_tokens(*experts: int) -> Record:
    return {"layer": {"dead_share": len(experts) / 8, "dead_experts": hex(sum(1 << expert for expert in experts))}}


CASES: dict[str, tuple[int, Callable[[int], Record], dict[str, Any], list[tuple[int, str]]]] = {
    "nothing": (1200, lambda step: {}, {}, []),
    "all tokens to three experts": (30, lambda step: uneven(3), {}, [(20, "collapsed router")]),
    "it stays": (20 + REMIND, lambda step: uneven(3), {}, [(20, "collapsed router"), (520, "collapsed router")]),
    "uneven early": (200, lambda step: uneven(3.5), {}, []),
    "uneven for long": (220, lambda step: uneven(3.5), {}, [(210, "collapsed router")]),
    "uneven in a fine-tuning": (20, lambda step: uneven(3.5), {"fresh": False}, [(20, "collapsed router")]),
    "uneven now and then": (400, lambda step: uneven(8 if step % 15 == 0 else 3), {}, []),
    "too few tokens to judge": (400, lambda step: uneven(3) | {"tokens": 20}, {}, []),
    "uneven while steps are skipped": (40, lambda step: uneven(3) | {"skipped": step % 9 == 0}, {}, []),
    "an expert dead early": (400, lambda step: without_tokens(5), {}, []),
    "an expert dead for long": (500, lambda step: without_tokens(5), {}, [(500, "dead experts")]),
    "two experts dead": (210, lambda step: without_tokens(5, 7), {}, [(210, "dead experts")]),
    "other experts in every step": (600, lambda step: without_tokens(step % 8, (step + 1) % 8), {}, []),
    "dead by chance": (600, lambda step: without_tokens(5, 7) | {"tokens": int(step % 3 == 0)}, {}, []),
    "half of them dead in a fine-tuning": (20, lambda step: without_tokens(1, 3, 5, 7), {"fresh": False},
                                           [(20, "dead experts")]),
    "an expert that fine-tuning does not use": (600, lambda step: without_tokens(5), {"fresh": False}, []),
    "collapsed, so dead": (220, lambda step: {"layer": {**uneven(3)["layer"], **without_tokens(0, 1, 2)["layer"]}},
                           {}, [(20, "collapsed router")]),
    "worse than at the start": (30, lambda step: {"loss": 4.0 if step == 1 else 6.0}, {},
                                [(20, "learning rate too high")]),
    "skipped again and again": (20, lambda step: {"skipped": step > 6, "loss": math.nan if step > 6 else 4.0}, {},
                                [(10, "not finite")]),
    "a jump, then not finite": (
        20, lambda step: {"loss": 400.0} if step == 3 else {"loss": math.nan, "skipped": True} if step > 7 else {}, {},
        [(10, "learning rate too high")],
    ),
    "a spike": (100, lambda step: {"loss": 8.0} if 40 < step < 50 else {}, {}, [(50, "loss spike")]),
    "a spike that was skipped": (60, lambda step: {"loss": 8.0, "skipped": True} if step == 45 else {}, {},
                                 [(50, "loss spike")]),
    "spikes that are none by choice": (100, lambda step: {"loss": 8.0} if 40 < step < 50 else {},
                                       {"guards": {"spike_threshold": None}}, []),
    "a still loss at a small rate": (210, lambda step: {"loss": 4 + step % 3 / 10, "lr": 1e-6}, {},
                                     [(210, "learning rate too low")]),
    "a still loss in the warm-up": (400, lambda step: {"loss": 4 + step % 3 / 10, "lr": 1e-6},
                                    {"schedule": {"warmup_steps": 300}}, []),
    "a still loss at a small rate beside Muon's": (400, lambda step: {"loss": 4 + step % 3 / 10, "lr": 1e-6},
                                                   {"optimizer": {"name": "muon"}}, []),
    "a still loss at a usual rate": (400, lambda step: {"loss": 4 + step % 3 / 10}, {}, []),
    "a falling loss at a small rate": (400, lambda step: {"lr": 1e-6}, {}, []),
    "a still loss of a run that goes on": (400, lambda step: {"step": step + 500, "loss": 4.0, "lr": 1e-6}, {}, []),
    "a step not finite": (100, lambda step: {"skipped": True, "loss": math.nan} if step == 55 else {}, {},
                          [(60, "not finite")]),
    "held-out text worse": (40, lambda step: {"val_loss": 3 + abs(step - 20) / 50, "loss": 4 - step / 50}
                            if step % 10 == 0 else {"loss": 4 - step / 50}, {}, [(40, "memorising")]),
    "held-out text hardly worse": (60, lambda step: {"val_loss": 3 + abs(step - 20) / 1000, "loss": 4 - step / 50}
                                   if step % 10 == 0 else {"loss": 4 - step / 50}, {}, []),
    "both worse": (40, lambda step: {"val_loss": 3 + abs(step - 20) / 50, "loss": 4.0}
                   if step % 10 == 0 else {"loss": 4.0}, {}, []),
    "held-out loss not finite": (50, lambda step: {"val_loss": math.nan} if step % 10 == 0 else {}, {}, []),
    "one evaluation worse": (50, lambda step: {"val_loss": 3.0 + (step == 40)} if step % 10 == 0 else {}, {}, []),
    "slow reading": (40, lambda step: {"data_seconds": 0.05}, {}, [(20, "waiting for data")]),
    "slow reading once": (100, lambda step: {"data_seconds": 2.0, "seconds": 2.1} if step == 35 else {}, {}, []),
    "reading in no time": (40, lambda step: {"data_seconds": 0.003, "seconds": 0.006}, {}, []),
    "memory rises": (400, lambda step: {"host_bytes": 2**30 + step * 2**21}, {}, [(200, "creeping memory")]),
    "memory rises slowly": (1600, lambda step: {"host_bytes": 2**30 + step * 2**18}, {},
                            [(1000, "creeping memory"), (1500, "creeping memory")]),
    "memory levels off": (800, lambda step: {"host_bytes": 2**33 - 2**38 // (step + 40)}, {}, []),
    "memory steps up once": (800, lambda step: {"host_bytes": 2**30 + (step > 100) * 2**29}, {}, []),
    "memory comes and goes": (800, lambda step: {"host_bytes": 2**30 + step % 90 * 2**23}, {}, []),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_is_said_of_records(name: str) -> None:
    steps, change, run, expected = CASES[name]
    assert said(changed(steps, change), **run) == expected


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        ({}, []),
        ({"schedule": {"warmup_steps": 100}, "steps": 60}, ["warm-up too long"]),
        ({"schedule": {"warmup_steps": 100, "name": "constant"}, "steps": 100}, ["warm-up too long"]),
        ({"schedule": {"warmup_steps": 51, "name": "constant"}, "steps": 100}, ["warm-up too long"]),
        ({"schedule": {"warmup_steps": 50, "name": "constant"}, "steps": 100}, []),
        ({"schedule": {"warmup_steps": 100, "name": "wsd", "decay_fraction": 0.9}, "steps": 200}, ["warm-up too long"]),
        ({"schedule": {"warmup_steps": 5, "name": "wsd", "decay_fraction": 1.0}, "steps": 200}, []),
        ({"schedule": {"warmup_steps": 170, "name": "multistep"}, "steps": 200}, ["warm-up too long"]),
        ({"schedule": {"warmup_steps": 0}, "steps": 1}, []),
        ({"epochs": {"books": 3.9, "code": 12.5}}, ["repeated data"]),
        ({"epochs": {"chats": 4.5}, "fresh": False, "finetuning": True}, []),
        ({"epochs": {"books": 4.5}, "fresh": False}, ["repeated data"]),
    ],
)
def test_what_is_said_of_settings(run: dict[str, Any], expected: list[str]) -> None:
    assert [alarm.symptom.name for alarm in Alarms(plan(**run)).at_start()] == expected


def test_only_sources_that_are_read_too_often_are_named() -> None:
    (alarm,) = Alarms(plan(epochs={"books": 3.9, "code": 12.5})).at_start()
    assert "code is read 12.5 times over the run" in alarm.text
    assert "books" not in alarm.text


def test_a_sentence_names_three_layers_and_the_event_all() -> None:
    deep = Plan(TrainConfig(steps=100, global_batch_size=4), tiny(num_hidden_layers=6))
    layer = {**healthy(1)["experts"][0], **uneven(3)["layer"]}
    alarms = Alarms(deep)
    (alarm,) = [a for step in range(1, 21) for a in alarms.after(healthy(step) | {"experts": [layer] * 5})]
    assert [found["layer"] for found in alarm.found] == [1, 2, 3, 4, 5]
    assert "layer 3 uses 3.0 of its 8 experts" in alarm.text
    assert "layer 4" not in alarm.text
    assert "; and 2 more. Raise" in alarm.text


def test_a_rollback_begins_a_new_row_of_steps() -> None:
    first, again = list(changed(15, lambda step: uneven(3))), list(changed(14, lambda step: uneven(3)))
    assert said([*first, *again]) == []


def test_a_rollback_forgets_the_best_evaluation_that_came_after_its_checkpoint() -> None:
    """The weights that it was of are gone, so what follows is no worse than they were."""
    first = [healthy(step) | ({"val_loss": 3.0} if step == 40 else {}) for step in range(1, 41)]
    again = [healthy(step) | {"loss": 3.0} | ({"val_loss": 3.5} if step % 10 == 0 else {}) for step in range(31, 81)]
    assert [name for _, name in said([*first, *again])] == []
    kept = [healthy(step) | ({"val_loss": 3.0} if step in (20, 40) else {}) for step in range(1, 41)]
    assert [name for _, name in said([*kept, *again])] == ["memorising"]


def test_memory_of_the_past_does_not_grow() -> None:
    alarms = Alarms(plan())
    sizes = []
    for record in changed(4000, lambda step: {"host_bytes": 2**30 + step}):
        alarms.after(record)
        sizes.append(len(pickle.dumps(vars(alarms))))
    assert max(sizes[2000:]) <= 1.1 * max(sizes[:2000])
