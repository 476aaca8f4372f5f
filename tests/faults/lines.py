"""A pytest plugin that prints a line for each row of faults: what happens, what was seen, and how long it took."""

from __future__ import annotations

from collections import defaultdict

import pytest

from tests.faults.rows import ROWS


class Lines:
    """Collects the outcomes of the tests of every row."""

    def __init__(self) -> None:
        self.outcomes: dict[int, list[pytest.TestReport]] = defaultdict(list)

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item):  # type: ignore[no-untyped-def]
        report: pytest.TestReport = (yield).get_result()
        if report.when == "call" or report.outcome != "passed":
            for mark in item.iter_markers("row"):
                self.outcomes[mark.args[0]].append(report)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        write = terminalreporter.write_line
        write("")
        passed = failed = 0
        for number, fault in ROWS.items():
            reports = self.outcomes.get(number, [])
            bad = [report for report in reports if report.outcome == "failed"]
            skipped = [report for report in reports if report.outcome == "skipped"]
            seconds = sum(report.duration for report in reports)
            if not reports:
                write(f"row {number:2}  {fault}: not tried")
                continue
            if bad:
                failed += 1
                verdict = f"FAILED: {bad[0].nodeid}"
            elif len(skipped) == len(reports):
                failed += 1
                verdict = f"cannot be tried here: {skipped[0].longrepr[2] if skipped[0].longrepr else ''}"
            else:
                passed += 1
                verdict = f"passed, {len(reports) - len(skipped)} tests, {seconds:.0f} s"
                verdict += f"; not tried: {skipped[0].longrepr[2]}" if skipped else ""
            write(f"row {number:2}  {fault}: {verdict}")
        write(f"{passed} passed, {failed} failed")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Lines(), "faults-lines")
