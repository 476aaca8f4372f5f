"""The display of a run: a live bar on a terminal, plain lines everywhere else."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

RECENT_STEPS = 20  # over which speeds are averaged
REFRESH_SECONDS = 0.1


class Status:
    """The newest figures of a run, its speed averaged over the recent steps."""

    def __init__(self, title: str, total_steps: int, start_step: int) -> None:
        self.title = title
        self.total_steps = total_steps
        self.step = start_step
        self.newest: dict[str, Any] = {}
        self.evaluated: int | None = None  # the step of the newest held-out loss
        self._arrivals: deque[tuple[int, float]] = deque(maxlen=RECENT_STEPS)  # step, seconds on the monotonic clock
        self._speeds: deque[float] = deque(maxlen=RECENT_STEPS)  # tokens/s

    def update(self, record: Mapping[str, Any], now: float) -> None:
        self.step = record["step"]
        self.amend(record)
        self._arrivals.append((self.step, now))
        if "tokens_per_second" in record:
            self._speeds.append(record["tokens_per_second"])

    def amend(self, figures: Mapping[str, Any]) -> None:
        """Take in further figures of the newest step."""
        self.newest |= figures
        if "val_loss" in figures:
            self.evaluated = self.step

    def rewind(self, step: int) -> None:
        """Go back to an earlier step."""
        self.step = step
        self.evaluated = None
        self._arrivals.clear()

    @property
    def seconds_left(self) -> float | None:
        """Seconds to the last step, evaluation and saving included; None until two steps have been seen."""
        if len(self._arrivals) < 2:
            return None
        (first_step, first), (last_step, last) = self._arrivals[0], self._arrivals[-1]
        return (last - first) / (last_step - first_step) * (self.total_steps - last_step)

    @property
    def figures(self) -> str:
        """Loss, rates and speed: `loss 3.2141  lr 3.00e-04  grad 0.82  4,812 tokens/s`.

        A held-out loss of an earlier step is not among them.
        """
        formats = {"loss": "loss {:.4f}", "val_loss": "val {:.4f}", "lr": "lr {:.2e}", "grad_norm": "grad {:.2f}"}
        if self.evaluated != self.step:
            del formats["val_loss"]
        shown = [text.format(self.newest[key]) for key, text in formats.items() if self.newest.get(key) is not None]
        if self._speeds:
            shown.append(f"{sum(self._speeds) / len(self._speeds):,.0f} tokens/s")
        return "  ".join(shown)

    @property
    def time_left(self) -> str:
        seconds = self.seconds_left
        return "" if seconds is None else f"{format_seconds(seconds)} left"

    def line(self) -> str:
        return "  ".join(
            filter(None, [f"{self.title} {self.step:,}/{self.total_steps:,}", self.figures, self.time_left])
        )


class Display:
    """A live bar on a terminal, plain lines elsewhere. If the stream is closed, it falls silent."""

    def __init__(self, status: Status) -> None:
        console = Console()
        self._silent = False
        # Refreshed by hand: rich's own thread could not tell us that the terminal was closed.
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None
        self._refreshed = 0.0
        if self._live:
            with self._unless_gone():
                self._live.start()
                self._live.update(_bar(status), refresh=True)
                # A second Ctrl-C ends the process at once, with no time to show a hidden cursor again.
                console.show_cursor(True)

    def step(self, status: Status, due: bool) -> None:
        """Show a finished step; on a stream other than a terminal only if a line is `due`."""
        if self._live is None:
            if due:
                self.message(status.line())
        elif due or time.monotonic() - self._refreshed > REFRESH_SECONDS:
            self._refreshed = time.monotonic()
            if not self._silent:
                with self._unless_gone():
                    self._live.update(_bar(status), refresh=True)

    def message(self, text: str) -> None:
        """Print a line, above the bar on a terminal."""
        if not self._silent:
            with self._unless_gone():
                if self._live:
                    self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)
                else:
                    print(text, flush=True)

    def close(self) -> None:
        if self._live:
            with self._unless_gone():
                self._live.stop()

    @contextmanager
    def _unless_gone(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError):  # ValueError: the stream is closed, or cannot encode a character
            self._silent = True


def _bar(status: Status) -> Group:
    """Two lines: the progress, and the figures."""
    row = Table.grid(padding=(0, 1), expand=True)
    for ratio in (None, 1, None, None):
        row.add_column(ratio=ratio, no_wrap=True)
    bar = ProgressBar(total=status.total_steps, completed=status.step)
    row.add_row(Text(status.title, style="bold"), bar, f"{status.step:,}/{status.total_steps:,}", status.time_left)
    figures = status.figures
    if status.evaluated not in (None, status.step):
        figures += f"  val {status.newest['val_loss']:.4f} in step {status.evaluated:,}"
    return Group(row, Text(f"  {figures}", no_wrap=True, overflow="ellipsis"))


def format_seconds(seconds: float) -> str:
    """`48s`, `12m03s`, `3h05m`, `2d04h`."""
    whole = round(seconds)
    for size, unit, small_size, small_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // small_size:02d}{small_unit}"
    return f"{whole}s"
