"""The picture of a recording: one row per layer, one panel per head, then one with the experts of each token.

The rows of every panel are the attending tokens, so that the labels on the left hold for the whole row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moe_lm.common.errors import MoeLmError, UsageError
from moe_lm.common.process import how_to_install
from moe_lm.tools.explain.recording import Recording, shares

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TOKENS = 32  # whose labels stay readable
INCHES = 0.13  # per token
WIDTH, HEIGHT = 10.0, 20.0  # inches of panels in which labels stay readable on a page
SIGNS = str.maketrans({" ": "·", "\n": "↵", "\t": "→", "\r": "←"})
FONTS = ("DejaVu Sans", "Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "WenQuanYi Micro Hei", "PingFang SC",
         "Microsoft YaHei", "Arial Unicode MS")  # fmt: skip
FORMATS = (".png", ".svg", ".pdf")
MASKED = "#eeeeee"  # the tokens that one cannot attend to


def draw(
    recording: Recording,
    decode: Callable[[int], str],
    layers: Sequence[int],
    heads: Sequence[int],
    experts: int,
    title: str,
) -> Figure:
    """Draw the last `TOKENS` tokens. Attention to earlier ones is summed up in one column, so that rows sum to 1.

    `decode` gives the text of one id.
    """
    import matplotlib
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize, PowerNorm
    from matplotlib.figure import Figure

    fonts = installed_fonts()
    before = max(0, len(recording.ids) - TOKENS)
    names = [label(id_, decode(id_), fonts) for id_ in recording.ids[before:]]
    seen = [f"{before} before", *names] if before else names
    widths = [max(len(seen), 8) * INCHES] * len(heads)
    if recording.routings:
        widths.append(min(max(experts, 8), 2 * TOKENS) * INCHES)
    height = max(len(names) * INCHES, 1.0) + 0.45
    size = max(sum(widths) + 0.25 * len(widths) + 2.5, 7.0), height * len(layers) + 1.3
    scale = PowerNorm(0.5, 0, 1)  # small weights, of which most rows consist, stay visible
    with matplotlib.rc_context({"font.family": fonts, "font.size": 8, "svg.fonttype": "path"}):
        figure = Figure(figsize=size, dpi=120, layout="constrained")
        figure.suptitle(spelled(title, fonts), parse_math=False, x=0.01, ha="left", fontsize=9)
        panels = figure.subplots(len(layers), len(widths), squeeze=False, width_ratios=widths)
        for row, layer in zip(panels, layers, strict=True):
            for axes, head in zip(row, heads, strict=False):
                weights = fold(recording.attention[layer][head], before)
                axes.set_facecolor(MASKED)
                for part, colours in zip(apart(weights), ("Greys", "Blues"), strict=True):
                    axes.imshow(part, cmap=colours, norm=scale, aspect="auto", interpolation="nearest")
                axes.set_title(f"layer {layer}, head {head}" if axes is row[0] else f"head {head}", loc="left", pad=3)
                _name(axes, names if axes is row[0] else None, seen if layer == layers[-1] else None)
            if recording.routings:
                _draw_experts(row[-1], recording, layer, before, experts)
        bars = [("attention (square-root scale)", ScalarMappable(scale, "Blues"))]
        if recording.routings:
            bars.append(("share of the routed output", ScalarMappable(Normalize(0, 1), "Oranges")))
        for name, bar in bars:
            shrink = min(1.0, 2.0 / size[1])
            drawn = figure.colorbar(bar, ax=panels, label=name, anchor=(0, 1), shrink=shrink, aspect=14, pad=0.01)
            drawn.set_ticks([0, 0.01, 0.05, 0.2, 0.5, 1] if bar.norm is scale else [0, 0.25, 0.5, 0.75, 1])
            drawn.ax.minorticks_off()
            drawn.ax.yaxis.set_major_formatter("{x:g}")
        figure.canvas.draw()  # fonts are looked up now, which needs the context
    return figure


def readable(tokens: int) -> tuple[int, int]:
    """The layers and heads of which a picture of so many tokens stays readable."""
    side = max(min(tokens, TOKENS), 8) * INCHES
    return int(HEIGHT // (side + 0.45)), int(WIDTH // (side + 0.25))


def save(figure: Figure, out: Path) -> None:
    """Write the figure. Raises MoeLmError when that fails."""
    try:
        figure.savefig(out, bbox_inches="tight", pad_inches=0.1)
    except OSError as error:
        raise MoeLmError(f"{out} cannot be written ({error.strerror}); choose another --out") from error


def check_name(out: Path) -> None:
    """Raise UsageError for a name that does not end as a picture's does."""
    if out.suffix not in FORMATS:
        raise UsageError(f"--out {out} is not the name of a picture; expected one that ends in {', '.join(FORMATS)}")


def fold(weights_SS: Tensor, before: int) -> Any:
    """The rows of the tokens from `before` on, with the weights on earlier tokens summed in a first column.

    Later tokens are masked, so that they are not taken for small weights.
    """
    import numpy as np

    rows = weights_SS[before:]
    shown = rows[:, before:]
    later = torch.ones_like(shown, dtype=torch.bool).triu(1)
    if before:
        shown = torch.cat((rows[:, :before].sum(-1, keepdim=True), shown), dim=1)
        later = torch.cat((torch.zeros_like(later[:, :1]), later), dim=1)
    return np.ma.masked_array(shown.numpy(), later.numpy())


def apart(weights: Any) -> tuple[Any, Any]:
    """The first column of masked weights, where attention rests that looks for nothing, and the other columns."""
    import numpy as np

    first, others = weights.copy(), weights.copy()
    first[:, 1:] = np.ma.masked
    others[:, :1] = np.ma.masked
    return first, others


def label(id_: int, text: str, fonts: Sequence[str]) -> str:
    """The label of a token: its text with signs for white space, or its id if it is not text or no font has it."""
    text = text.translate(SIGNS)
    if not text or not text.isprintable() or "\ufffd" in text or not _has_glyphs(text, fonts):
        return f"#{id_}"
    return text if len(text) <= 12 else text[:11] + "…"


def spelled(text: str, fonts: Sequence[str]) -> str:
    """The text, with escapes for characters that no font has."""
    return "".join(
        sign if sign == "\n" or _has_glyphs(sign, fonts) else sign.encode("unicode_escape").decode() for sign in text
    )


def installed_fonts() -> list[str]:
    """The `FONTS` that are installed; the first one comes with matplotlib."""
    from matplotlib import font_manager

    here = set(font_manager.get_font_names())
    return [name for name in FONTS if name in here]


def need_matplotlib() -> None:
    """Raise MoeLmError when matplotlib is not installed."""
    import importlib.util

    if importlib.util.find_spec("matplotlib") is None:
        raise MoeLmError(f"pictures are drawn by matplotlib, which is not installed; {how_to_install('plot')}")


def _has_glyphs(text: str, fonts: Sequence[str]) -> bool:
    from matplotlib import font_manager

    faces = [font_manager.get_font(font_manager.findfont(name)) for name in fonts]
    return all(any(face.get_char_index(ord(sign)) for face in faces) for sign in text)


def _draw_experts(axes: Axes, recording: Recording, layer: int, before: int, experts: int) -> None:
    if layer not in recording.routings:
        axes.axis("off")
        axes.text(0.5, 0.5, "a dense layer", ha="center", va="center", color="grey", transform=axes.transAxes)
        return
    share_SE = shares(recording.routings[layer], experts)[before:]
    axes.imshow(share_SE.numpy(), cmap="Oranges", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    axes.set_title("experts", loc="left", pad=3)
    step = next(step for step in (1, 2, 4, 8, 16, 32, 64, 128) if experts / step <= 16 or step == 128)
    axes.set_xticks(range(0, experts, step))
    axes.set_yticks([])
    axes.tick_params(length=0, pad=2)


def _name(axes: Axes, rows: Sequence[str] | None, columns: Sequence[str] | None) -> None:
    axes.tick_params(length=0, pad=2)
    axes.set_yticks(range(len(rows or ())), rows or (), parse_math=False)
    axes.set_xticks(range(len(columns or ())), columns or (), parse_math=False, rotation=90)
