"""The verb `sample`: the text on stdout, everything about it on stderr."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_lm.common.terminal import colours, printable
from moe_lm.generate.decode import Settings
from moe_lm.generate.painter import Painter
from moe_lm.generate.penalties import NO_PENALTIES, Penalties
from moe_lm.generate.session import Session
from moe_lm.generate.strategies import Sampling

if TYPE_CHECKING:
    from moe_lm.parallel.spread import Spread


def sample(
    run: Path,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int | None,
    stop: Sequence[str],
    truncate: bool = False,
    base: Path | None = None,
    show_routing: int | None = None,
    spread: Spread | None = None,
    compiled: bool = False,
    device: str = "auto",
    dtype: str = "float32",
    **more: Any,
) -> None:
    """Write the text that follows `prompt`; on a terminal after the prompt itself. `more` is as in `settings_of`.

    `show_routing` is the layer whose experts the tokens are coloured by; `spread`, `compiled`, `device` and `dtype`
    are as in `Session.load`.
    """
    settings = settings_of(max_new_tokens, temperature, top_k, top_p, seed, **more)
    session = Session.load(run, device, base, spread, compiled, dtype)
    painter = None if show_routing is None else Painter(session.model.config, show_routing, colours(sys.stdout))
    text = session.complete(prompt, settings, stop, truncate, None if painter is None else painter.see)
    show: Callable[[str], str] = str
    if sys.stdout.isatty():
        print(prompt, end="", flush=True)
        show = printable if painter is None else painter.paint
    for piece in text:
        print(show(piece), end="", flush=True)
    print()
    if painter is not None:
        print(painter.legend(colours(sys.stderr)), file=sys.stderr)
    speed = f", {text.speed:.1f} tokens/s" if text.speed else ""
    print(f"{text.tokens} tokens{speed}, seed {settings.seed}", file=sys.stderr)


def settings_of(
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int | None,
    min_p: float | None = None,
    typical_p: float | None = None,
    penalties: Penalties = NO_PENALTIES,
    min_new_tokens: int = 0,
    logprobs: int | None = None,
    routing: bool = False,
) -> Settings:
    """What a command line asked for; without a seed one is drawn."""
    seed = secrets.randbelow(1 << 32) if seed is None else seed
    sampling = Sampling(temperature, top_k, top_p, min_p, typical_p, penalties)
    return Settings(max_new_tokens, sampling, seed, min_new_tokens, logprobs, routing)
