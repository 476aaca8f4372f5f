"""Text whose tokens have the colour of the expert that predicted them, and the legend of the colours."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from moe_lm.common.errors import UsageError
from moe_lm.common.terminal import printable
from moe_lm.config.model import ModelConfig
from moe_lm.generate.decode import Step
from moe_lm.generate.text import Delta

LAST = -1  # stands for the last layer with experts
IN_LEGEND = 16  # experts, those with the most tokens
RESET = "\x1b[0m"
# A terminal's 6 x 6 x 6 colours without the greys and those too dark for black letters. The stride is near the
# golden ratio, so that neighbours differ, and coprime to their number, so that every colour is used before one repeats.
CUBE = ((red, green, blue) for red in range(6) for green in range(6) for blue in range(6))
# The first experts have the nearest to the colours of Okabe and Ito, which also who sees fewer colours tells apart.
FIRST = (214, 117, 36, 227, 202, 175, 69, 250)
LIGHT = [16 + 36 * r + 6 * g + b for r, g, b in CUBE if 3 * r + 6 * g + b >= 20 and max(r, g, b) - min(r, g, b) > 1]
STRIDE = next(step for step in range(round(0.618 * len(LIGHT)), 0, -1) if math.gcd(step, len(LIGHT)) == 1)
PALETTE = list(dict.fromkeys([*FIRST, *(LIGHT[number * STRIDE % len(LIGHT)] for number in range(len(LIGHT)))]))


class Painter:
    """Paints each token with the colour of the expert that has the largest weight in one layer.

    It took the position before, from which the token was predicted. Without `colours` its number follows the token
    instead. Raises UsageError for a layer that has no routed experts.
    """

    def __init__(self, config: ModelConfig, layer: int, colours: bool) -> None:
        self.layer = routed_layer(config, layer)
        self._place, self._colours = config.moe_layers.index(self.layer), colours
        self._tokens: Counter[int] = Counter()
        self._last = 0

    def paint(self, delta: Delta) -> str:
        """The text of a delta, which was decided with `Settings.routing`."""
        if delta.step.token is not None:
            assert delta.step.experts is not None
            self._last = delta.step.experts[self._place][0]
            self._tokens[self._last] += 1
        if not delta.text:
            return ""
        if not self._colours:
            return f"{printable(delta.text)}[{self._last}]"
        lines = printable(delta.text).split("\n")  # a terminal may paint the rest of a line that ends within a colour
        return "\n".join(f"{colour(self._last)}{line}{RESET}" if line else "" for line in lines)

    def legend(self, colours: bool) -> str:
        """The experts, each with its colour and its share of the tokens."""
        total = self._tokens.total()
        lines = [f"layer {self.layer}, the strongest expert of each token:"]
        for expert, tokens in self._tokens.most_common(IN_LEGEND):
            patch = f"{colour(expert)}  {RESET} " if colours else ""
            lines.append(f"{patch}expert {expert:<3} {tokens / total:6.1%}")
        rest = len(self._tokens) - IN_LEGEND
        return "\n".join([*lines, f"and {rest} more"] if rest > 0 else lines)


def routed_layer(config: ModelConfig, layer: int) -> int:
    """The number of a layer with routed experts. Raises UsageError when the layer has none."""
    if not config.moe_layers:
        raise UsageError("the model is dense: it has no experts, so there is no routing to show; leave it out")
    if layer == LAST:
        return config.moe_layers[-1]
    if layer not in config.moe_layers:
        layers = ", ".join(map(str, config.moe_layers))
        raise UsageError(f"layer {layer} (counted from 0) has no routed experts; choose one of {layers}")
    return layer


def by_layer(config: ModelConfig, steps: Sequence[Step]) -> dict[str, list[list[int]]]:
    """The experts of each token, the strongest first, by the number of the layer."""
    layers: dict[str, list[list[int]]] = {str(layer): [] for layer in config.moe_layers}
    for step in steps:
        for chosen, experts in zip(layers.values(), step.experts or (), strict=True):
            chosen.append(list(experts))
    return layers


def colour(expert: int) -> str:
    """The terminal's sequence for black text on the expert's colour, one of its 256."""
    return f"\x1b[30;48;5;{PALETTE[expert % len(PALETTE)]}m"
