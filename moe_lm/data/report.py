"""What `prepare` says in the end."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from moe_lm.data.shards import Manifest
from moe_lm.text.files import Report

MOST_HELD_OUT = 0.1  # of a source, without a word


@dataclass(frozen=True)
class PrepareReport:
    """The manifest of each source by name. As text: documents, bytes, tokens, and counts of what was skipped.

    `files` are those of sources of text, whose documents are whole files or pieces of them.
    """

    manifests: dict[str, Manifest]
    files: dict[str, int]
    validation_fraction: float
    up_to_date: frozenset[str] = field(default=frozenset(), compare=False)  # sources whose shards were there
    died: int = field(default=0, compare=False)  # processes, whose pieces others did

    def __str__(self) -> str:
        lines = [line for name in self.manifests for line in self._lines(name)]
        if self.died:
            lines.append(
                f"killed, perhaps because memory ran out: {self.died} of the processes; the others did the rest"
            )
        return "\n".join(lines)

    def _lines(self, name: str) -> Iterator[str]:
        manifest, files = self.manifests[name], self.files[name]
        if manifest.notes:
            yield from _lines_in_place(name, manifest, name in self.up_to_date)
            return
        count, text_bytes = manifest.documents or 0, manifest.text_bytes or 0
        whole = f"{files} file{'s' * (files != 1)} in " if 0 < files < count else ""
        unit = "pieces" if whole else "documents"
        yield (
            f"{name}: {whole}{_counted(count, unit)}, {text_bytes:,} bytes, {manifest.tokens:,} tokens "
            f"({text_bytes / manifest.tokens:.2f} bytes per token)"
            + (", up to date" if name in self.up_to_date else "")
        )
        documents, tokens = (sum(getattr(shard, of) for shard in manifest.validation) for of in ("documents", "tokens"))
        share = tokens / manifest.tokens
        yield f"  held out: {_counted(documents, unit)}, {tokens:,} tokens ({share:.1%})"
        if share > MOST_HELD_OUT and share > 2 * self.validation_fraction:
            yield (
                f"  warning: {share:.0%} of the text is held out, as it has only {count} {unit}, of which "
                f"data.validation_fraction={self.validation_fraction} holds out at least one; "
                + ("set a lower piece_bytes of the source" if whole else "divide it into more, or hold out none")
            )
        report = Report(skipped=manifest.skipped, examples=manifest.examples)
        yield from (f"  {line}" for line in report.skipped_lines())


def _counted(count: int, units: str) -> str:
    return f"{count:,} {units if count != 1 else units.removesuffix('s')}"


def _lines_in_place(name: str, manifest: Manifest, up_to_date: bool) -> Iterator[str]:
    held_out = sum(shard.tokens for shard in manifest.validation)
    yield (
        f"{name}: {manifest.documents:,} documents, {manifest.tokens:,} tokens, {held_out:,} of them held out "
        f"({held_out / manifest.tokens:.1%})" + (", up to date" if up_to_date else "")
    )
    yield from (f"  {note}" for note in manifest.notes)
