"""What a page says in words: how a run stands, what looks wrong, and what each picture shows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import NamedTuple

import numpy as np

from moe_lm.tools.report.charts import short
from moe_lm.tools.report.reading import COLUMNS, Run, column
from moe_lm.tools.report.thinning import Row
from moe_lm.train.display import format_seconds
from moe_lm.train.symptoms import SYMPTOMS

TROUBLE = {  # events, each with its title and what to do
    "gave_up": ("The run gave up", "Do what the message says, then start it again."),
    "rollback": ("Rollback", "If there are several, lower the learning rate, or look at the text of these steps."),
    "failed_save": ("Failed save", "See that the disk of the run folder takes checkpoints."),
    "failed_upload": (
        "Failed upload",
        "See that the bucket of checkpoint.upload_to answers; the next checkpoint follows.",
    ),
    "full_disk": ("Full disk", "Make room, or keep fewer checkpoints with checkpoint.keep."),
    "damaged_checkpoint": ("Damaged checkpoint", "Check the others with moe-lm checkpoint verify, and the disk."),
    "data_left_out": (
        "Damaged shards left out",
        "Prepare the text again into another data.shards, and check the disk.",
    ),
    "slow_rank": ("Slow rank", "Look for other programs, a hot GPU or a slow disk on its machine."),
    "log": ("Incomplete log", "Make room on the disk of the run folder; steps are missing in these pictures."),
}
EVEN = 0.01  # of the loss: less is no change


class Point(NamedTuple):
    """Something that looks wrong."""

    title: str
    when: str
    said: str
    cure: str = ""


def standing(run: Run) -> str:
    """How far the run is, and whether it goes on."""
    steps = f"{run.step:,}" + ("" if run.total_steps is None else f" of {run.total_steps:,}") + " steps"
    if "gave_up" in run.events and run.events["gave_up"].newest[0] >= run.step:
        return f"gave up after {steps}"
    if run.step == run.total_steps:
        return f"finished, {steps}"
    ended = run.events.get("early_stop")
    if ended is not None and ended.newest[0] >= run.step:
        return f"{ended.newest[1]}; {steps}"
    stopped = run.events.get("stop")
    if stopped is not None and stopped.newest[0] >= run.step:
        return f"stopped after {steps}; the same command goes on"
    when = "" if run.last_time is None else f", the last at {datetime.fromtimestamp(run.last_time):%Y-%m-%d %H:%M}"
    return f"{steps}{when}"


def facts(run: Run) -> Iterator[tuple[str, str]]:
    """The figures of a run, each with its name."""
    means = run.steps.means()
    loss, speed = column(means, COLUMNS, "loss"), known(run, "tokens_per_second")
    yield "run", standing(run)
    yield "tokens", f"{run.tokens:,.0f}"
    yield "time in training", format_seconds(run.hours * 3600)
    if math.isfinite(last_of(loss)):
        yield "training loss", f"{last_of(loss):.4g}"
    if run.best is not None:
        yield "held-out loss", f"{run.held_out_loss:.4g}"
        yield "lowest held-out loss", f"{run.best[1]:.4g} after step {run.best[0]:,}"
    for name, value in run.by_source.items():
        yield f"held-out loss of {name}", f"{value:.4g}"
    if len(speed):
        yield "tokens a second", f"{np.median(speed):,.0f}"
    if run.skipped:
        yield "skipped steps", f"{run.skipped:,}"
    for kind, name in (("start", "starts"), ("save", "checkpoints saved"), ("rollback", "rollbacks")):
        if kind in run.events:
            yield name, f"{run.events[kind].number:,}"


def points(run: Run) -> list[Point]:
    """What looks wrong: symptoms as they came, since the first is often the cause, then what happened to the run."""
    found = sorted(run.findings.values(), key=lambda finding: finding.first)
    shown = []
    for finding in found:
        when = "by the settings"
        if finding.last:
            when = f"said at step {finding.first:,}"
            if finding.last > finding.first:
                when = f"said from step {finding.first:,} to step {finding.last:,}"
        shown.append(Point(sentence(finding.name), when, f"{sentence(finding.said)}.", finding.cure))
    for kind, (title, cure) in TROUBLE.items():
        if kind in run.events:
            events = run.events[kind]
            times = f"{events.number:,} times, last at " if events.number > 1 else ""
            said = sentence(events.newest[1].removeprefix("warning: "))
            shown.append(Point(title, f"{times}step {events.newest[0]:,}", said, cure))
    return shown


def verdict(run: Run, found: Sequence[Point]) -> str:
    """The one sentence on top."""
    if run.unjudged:
        return f"The symptoms could not be looked for: {run.unjudged}."
    if found:
        return "One thing looks wrong." if len(found) == 1 else f"{len(found)} things look wrong."
    return f"Nothing looks wrong: none of the {len(SYMPTOMS)} symptoms showed in {run.step:,} steps."


# Titles of pictures


def loss_title(runs: Sequence[Run]) -> str:
    if len(runs) > 1:
        ends = [last_of(column(run.steps.means(), COLUMNS, "loss")) for run in runs]
        lowest = min((end for end in ends if math.isfinite(end)), default=None)
        if lowest is None:
            return "No step had a finite loss"
        best = runs[ends.index(lowest)]
        alike = sum(run.name == best.name for run in runs) > 1
        return f"Training loss ends lowest in {best.folder if alike else best.name}, at {lowest:.4g}"
    loss = column(runs[0].steps.means(), COLUMNS, "loss")
    first, last = first_of(loss), last_of(loss)
    if math.isnan(last):
        return "No step had a finite loss"
    moved = "hardly moved" if abs(last - first) < EVEN * first else "fell" if last < first else "rose"
    held_out = "" if runs[0].best is None else f"; held-out loss was lowest after step {runs[0].best[0]:,}"
    return f"Training loss {moved} from {first:.4g} to {last:.4g}{held_out}"


def rate_title(runs: Sequence[Run]) -> str:
    rates = known(runs[0], "lr")
    if len(runs) > 1 or not len(rates):
        return "Learning rate"
    return f"Learning rate: at most {short(rates.max())}, {short(rates[-1])} at last"


def norm_title(runs: Sequence[Run]) -> str:
    norms = known(runs[0], "grad_norm")
    if len(runs) > 1 or not len(norms):
        return "Gradient norm before clipping"
    highs = column(runs[0].steps.highs(), COLUMNS, "grad_norm")
    highest = highs[np.isfinite(highs)].max()
    return f"Gradient norm before clipping: {np.median(norms):.3g} in the median, {highest:.3g} at most"


def speed_title(runs: Sequence[Run]) -> str:
    speeds = [known(run, "tokens_per_second") for run in runs]
    if not all(map(len, speeds)):
        return "Tokens a second"
    if len(runs) > 1:
        medians = [float(np.median(speed)) for speed in speeds]
        return f"{runs[int(np.argmax(medians))].name} is the fastest"
    slow = np.percentile(speeds[0], 10)
    return f"{np.median(speeds[0]):,.0f} tokens a second in the median, a tenth of the time below {slow:,.0f}"


def known(run: Run, name: str) -> Row:
    """The finite values of a figure of the steps."""
    values = column(run.steps.means(), COLUMNS, name)
    return values[np.isfinite(values)]


def waiting_title(run: Run) -> str:
    seconds, data, between = waits(run)
    total = np.nansum(seconds) + np.nansum(between)
    return (
        f"Of the time, {share(np.nansum(data), total)} went into waiting for data, {share(np.nansum(between), total)} "
        "into evaluating, saving and all else between steps"
    )


def waits(run: Run) -> tuple[Row, Row, Row]:
    """Seconds of a step, of waiting for data in it, and between it and the step before."""
    means = run.steps.means()
    seconds, data, between = (column(means, COLUMNS, name) for name in ("seconds", "data_seconds", "between"))
    return seconds, np.nan_to_num(data), np.nan_to_num(between)


def share(part: float, whole: float) -> str:
    return f"{part / whole:.0%}" if whole else "0%"


def first_of(values: Row) -> float:
    finite = values[np.isfinite(values)]
    return float(finite[0]) if len(finite) else math.nan


def last_of(values: Row) -> float:
    finite = values[np.isfinite(values)]
    return float(finite[-1]) if len(finite) else math.nan


def sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
