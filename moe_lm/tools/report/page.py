"""The page: pictures and words of one or several runs in a template, without a script and without a network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

import moe_lm
from moe_lm.tools.report import words
from moe_lm.tools.report.charts import LEFT, RIGHT, WIDTH, Axis, Line, chart, grid_of_steps
from moe_lm.tools.report.heatmap import heat_map
from moe_lm.tools.report.reading import COLUMNS, HELD_OUT, Run, column

TEMPLATE = Path(__file__).with_name("page.html")
ROWS = {
    "start": "starts", "phase": "phases", "save": "saves", "skip": "skipped steps", "spike": "loss spikes",
    "rollback": "rollbacks", "slow_rank": "slow rank", "alarm": "alarms", "stop": "stops",
}  # fmt: skip
ROW = 22  # pixels of a kind of event


def page_of(runs: Sequence[Run]) -> str:
    """The HTML of these runs, laid over each other."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    cards = [card(run, number, len(runs) > 1) for number, run in enumerate(runs)]
    return template.render(
        title=", ".join(run.name for run in runs),
        cards=cards,
        several=len(runs) > 1,
        charts=[Markup(text) for text in charts(runs) if text],
        differences=differences(runs) if len(runs) > 1 else [],
        version=moe_lm.__version__,
    )


def card(run: Run, number: int, several: bool) -> dict[str, Any]:
    """What the template shows of a run by itself."""
    found = words.points(run)
    own = [] if several else [waiting_chart(run)]
    return {
        "name": run.name, "number": number, "folder": run.folder, "facts": list(words.facts(run)),
        "verdict": words.verdict(run, found), "points": found, "healthy": not found and not run.unjudged,
        "charts": [Markup(text) for text in [*own, timeline(run)] if text],
        "heat": [Markup(text) for text in heat_maps(run)],
        "samples": [(prompt, spread.items[::-1]) for prompt, spread in run.samples.items()],
        "tasks": tasks(run),
        "settings": [(key, run.settings[key]) for key in sorted(run.settings)],
        "events": [(kind, spread.number, spread.items[-20:][::-1]) for kind, spread in sorted(run.events.items())
                   if kind not in ("sample", "tasks")],
    }  # fmt: skip


def charts(runs: Sequence[Run]) -> Iterator[str]:
    """The pictures that all runs share."""
    title = words.loss_title(runs)
    yield chart(title, losses(runs, "tokens"), "tokens", "loss (nats)")
    unit, size = clock(max(run.hours for run in runs))
    yield chart("The same by the clock", losses(runs, "hours", size), f"{unit} of training", "loss (nats)")
    yield chart(words.rate_title(runs), over_steps(runs, "lr"), "step", "learning rate", from_zero=True)
    yield chart(words.norm_title(runs), over_steps(runs, "grad_norm", band=True), "step", "gradient norm")
    speeds = over_steps(runs, "tokens_per_second")
    yield chart(words.speed_title(runs), speeds, "step", "tokens a second", from_zero=True)
    if len(runs) > 1:
        seconds = over_steps(runs, "seconds")
        yield chart("Seconds of a step", seconds, "step", "seconds", from_zero=True)


def clock(hours: float) -> tuple[str, float]:
    """The unit of time for a run that took so long, and how many of it are an hour."""
    return ("hours", 1) if hours > 3 else ("minutes", 60) if hours > 0.05 else ("seconds", 3600)


def losses(runs: Sequence[Run], x_name: str, size: float = 1) -> list[Line]:
    """Training and held-out loss of every run, over a column, of which `size` are one."""
    lines = []
    for number, run in enumerate(runs):
        means, held_out = run.steps.means(), run.held_out.means()
        x, y = size * column(means, COLUMNS, x_name), column(means, COLUMNS, "loss")
        edges: dict[str, Any] = {}
        if len(runs) == 1 and run.steps.rows_of_a_span > 1:
            edges = {
                "low": column(run.steps.lows(), COLUMNS, "loss"),
                "high": column(run.steps.highs(), COLUMNS, "loss"),
            }
        name = "training" if len(runs) == 1 else run.name
        lines.append(Line(name, x, y, number, **edges))
        if len(held_out):
            name = "held-out text" if len(runs) == 1 else f"{run.name}, held-out text"
            colour = 1 if len(runs) == 1 else number
            x, y = size * column(held_out, HELD_OUT, x_name), column(held_out, HELD_OUT, "val_loss")
            lines.append(Line(name, x, y, colour, style="dots"))
    return lines


def over_steps(runs: Sequence[Run], name: str, band: bool = False) -> list[Line]:
    lines = []
    for number, run in enumerate(runs):
        means = run.steps.means()
        edges: dict[str, Any] = {}
        if band and len(runs) == 1 and run.steps.rows_of_a_span > 1:
            edges = {"low": column(run.steps.lows(), COLUMNS, name), "high": column(run.steps.highs(), COLUMNS, name)}
        lines.append(Line(run.name, column(means, COLUMNS, "step"), column(means, COLUMNS, name), number, **edges))
    return lines


def waiting_chart(run: Run) -> str:
    """Seconds of a step, in layers from below: waiting for data, computing, and what lies between steps."""
    seconds, data, between = words.waits(run)
    step = column(run.steps.means(), COLUMNS, "step")
    lines = [
        Line("between steps: evaluating, saving", step, seconds + between, 2, style="area"),
        Line("computing", step, seconds, 0, style="area"),
        Line("waiting for data", step, data, 1, style="area"),
    ]
    return chart(words.waiting_title(run), lines, "step", "seconds a step", from_zero=True)


def heat_maps(run: Run) -> Iterator[str]:
    """A picture for each MoE layer."""
    if run.load is None:
        return
    rows = run.load.means()
    layers, experts = run.load_shape
    shares = rows[:, 1:].reshape(len(rows), layers, experts)
    names = range(layers) if run.model is None or len(run.model.moe_layers) != layers else run.model.moe_layers
    for place, layer in enumerate(names):
        yield heat_map(layer, rows[:, 0], shares[:, place])


def timeline(run: Run) -> str:
    """The events over the run: a row for each kind, a mark for each event that is kept."""
    rows = {name: run.events[kind].items for kind, name in ROWS.items() if kind in run.events}
    numbers = {name: run.events[kind].number for kind, name in ROWS.items() if kind in run.events}
    if not rows:
        return ""
    height = ROW * len(rows) + 34
    axis = Axis(0, max(run.step, 1), False, LEFT + 50, WIDTH - RIGHT)
    parts = [grid_of_steps(axis, height)]
    for place, (name, events) in enumerate(rows.items()):
        y = ROW * place + 14
        parts.append(f'<text x="{LEFT + 40}" y="{y + 4}" text-anchor="end">{name}</text>')
        parts.append(f'<path class="grid" d="M{LEFT + 50} {y}H{WIDTH - RIGHT}"/>')
        for step, message in events:
            x = float(axis.place(np.array(float(step))))
            parts.append(f'<path class="mark {"bad" if name in BAD else ""}" d="M{x:.1f} {y - 7}v14">'
                         f"<title>step {step:,}: {escape(message[:200])}</title></path>")  # fmt: skip
    counts = ", ".join(f"{name} ({number})" for name, number in numbers.items())
    return (
        f'<figure class="wide"><figcaption>What happened, and when: {counts}</figcaption><svg class="chart" '
        f'viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{counts}, by step">{"".join(parts)}</svg></figure>'
    )


BAD = ("skipped steps", "loss spikes", "rollbacks", "alarms", "slow rank")


def tasks(run: Run) -> dict[str, Any]:
    """The results on tasks: a column for each task, a row for each time, the newest first."""
    times = [(step, found) for step, found in run.tasks.items if isinstance(found, dict)]
    names = list(dict.fromkeys(name for _, found in times for name in found))
    rows = [(step, [result(found.get(name)) for name in names]) for step, found in times[::-1]]
    return {"names": names, "rows": rows}


def result(found: Any) -> str:
    """`0.712 ± 0.014 (acc)`."""
    if not isinstance(found, dict):
        return ""
    main = next((key for key, value in found.items() if key not in ("n", "stderr") and is_number(value)), None)
    if main is None:
        return ""
    error = f" ± {found['stderr']:.3f}" if is_number(found.get("stderr")) else ""
    return f"{found[main]:.3f}{error} ({main})"


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float))


def differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """The settings in which the runs differ, but for their folders."""
    keys = sorted({key for run in runs for key in run.settings} - {"run_dir"})
    found = [(key, [str(run.settings.get(key, "–")) for run in runs]) for key in keys]
    return [(key, values) for key, values in found if len(set(values)) > 1]
