"""A preview of what fine-tuning trains on: examples token for token with their loss mask, and figures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from moe_lm.config.data import ChatDataConfig
from moe_lm.data.batches import IGNORE
from moe_lm.data.examples import ChatExample
from moe_lm.data.packing import Example
from moe_lm.data.pairs import Pair
from moe_lm.data.records import Splits
from moe_lm.tokenizer.tokenizer import Tokenizer

TRAINED, PROMPT, SPECIAL = "bold green", "dim", "cyan"
MARKS = "⟦", "⟧"  # around what is trained on, where there is no colour
# A terminal would obey these control characters instead of showing them.
CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), 127) if chr(code) not in "\t\n"}


def show_conversations(
    console: Console, tokenizer: Tokenizer, config: ChatDataConfig, data: Splits[ChatExample], count: int
) -> None:
    """Print the first `count` training examples, then figures for all of them, and what was left out."""
    for item in data.train[:count]:
        show_example(console, tokenizer, item.where, item)
    weights = sum(config.weights or [])
    table = _table("examples", *(["share of rows"] if weights else []))
    for number, source in enumerate(config.train):
        name = Path(source.path).name if source.path else source.origin
        items = [item for item in data.train if item.source == number]
        table.add_row(name, *_figures(items), *([f"{source.weight / weights:.1%}"] if source.weight else []))
    if len(config.train) > 1:
        table.add_row("all", *_figures(data.train))
    table.add_row("held out", *_figures(data.validation))
    console.print(table)
    show_skipped(console, data.report.skipped_lines())


def show_pairs(console: Console, tokenizer: Tokenizer, data: Splits[Pair], count: int) -> None:
    """Print both sides of the first `count` pairs, the chosen one first, then figures for all of them."""
    for pair in data.train[:count]:
        for name, side in zip(("chosen", "rejected"), pair.sides, strict=True):
            show_example(console, tokenizer, f"{pair.where}, {name}", side)
    table = _table("answers")
    for name, pairs in (("", data.train), ("held out, ", data.validation)):
        table.add_row(f"{name}chosen", *_figures([pair.chosen for pair in pairs]))
        table.add_row(f"{name}rejected", *_figures([pair.rejected for pair in pairs]))
    console.print(table)
    show_skipped(console, data.report.skipped_lines())


def show_skipped(console: Console, lines: Iterable[str]) -> None:
    for line in lines:
        console.print(Text(line), soft_wrap=True)


def show_example(console: Console, tokenizer: Tokenizer, title: str, example: Example) -> None:
    """Print the tokens of an example. Those that are trained on are coloured, or marked where there is no colour."""
    trained = int((example.targets != IGNORE).sum())
    console.print(Text(f"{title}: {len(example.targets) + 1} tokens, {trained} trained on", style="bold"))
    console.print(masked_text(tokenizer, example, marks=console.color_system is None), soft_wrap=True)
    console.print()


def masked_text(tokenizer: Tokenizer, example: Example, marks: bool) -> Text:
    """The text of an example, special tokens included; what is trained on is bold, with `marks` between ⟦ and ⟧."""
    # A target is the next token, so the last token of the text is only a target.
    ids = [*example.input_ids.tolist(), int(example.targets[-1])]
    trained = [False, *(example.targets != IGNORE).tolist()]
    if ids[-1] == IGNORE:
        ids, trained = ids[:-1], trained[:-1]
    special = set(tokenizer.special_tokens.values())
    text = Text()
    for is_trained, run in groupby(zip(ids, trained, strict=True), key=lambda pair: pair[1]):
        shown = Text(style=TRAINED if is_trained else PROMPT)
        for is_special, tokens in groupby((id_ for id_, _ in run), key=special.__contains__):
            decoded = tokenizer.decode(list(tokens), skip_special=False).translate(CONTROLS)
            shown.append(decoded, style=SPECIAL if is_special else "")
        text.append_text(Text.assemble(MARKS[0], shown, MARKS[1]) if marks and is_trained else shown)
    return text


def _table(counted: str, *further: str) -> Table:
    table = Table("", counted, "tokens", "trained on", "longest", *further)
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _figures(items: Sequence[Example]) -> list[str]:
    """The number of examples, of tokens and of tokens trained on, and the length of the longest example."""
    tokens = sum(len(item.input_ids) for item in items)
    trained = sum(int((item.targets != IGNORE).sum()) for item in items)
    longest = max((len(item.input_ids) for item in items), default=0)
    return [f"{len(items):,}", f"{tokens:,}", f"{trained:,} ({trained / max(tokens, 1):.1%})", f"{longest:,}"]
