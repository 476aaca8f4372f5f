"""`moe-lm report`: one or several runs become one HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moe_lm.common.errors import MoeLmError, UsageError
from moe_lm.common.files import check_writable, whole_file
from moe_lm.tools.report.page import page_of
from moe_lm.tools.report.reading import read_run

NAME = "report.html"
MOST = 8  # runs that one page tells apart


def report(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Write the page and return its path: by default in the run folder; of several runs in the current one.

    Raises UsageError for a folder without records, and for more than MOST runs; MoeLmError for a page that
    cannot be written.
    """
    if len(folders) > MOST:
        raise UsageError(f"{len(folders)} runs are more than one page tells apart; name at most {MOST}")
    if out is not None:
        check_writable(out, "--out")
    runs = [read_run(folder) for folder in folders]
    target = out or (runs[0].folder / NAME if len(runs) == 1 else Path(NAME))
    text = page_of(runs)
    try:
        with whole_file(target) as file:
            file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise MoeLmError(f"cannot write {target}: {error.strerror}; name another --out") from error
    return target
