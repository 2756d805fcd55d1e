"""A pytest plugin: a JSON line for each test as it ends, so that none is lost by a stop."""

import json
import os
from pathlib import Path
from typing import Any


def pytest_addoption(parser: Any) -> None:
    """``--rows FILE``."""
    parser.addoption("--rows", type=Path)


def pytest_configure(config: Any) -> None:
    """Tell the file what happens; among several processes, the one that hears from all does."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        config.pluginmanager.register(_Rows(config.getoption("--rows")))


class _Rows:
    def __init__(self, file: Path) -> None:
        self._file = file
        self._told: set[tuple[str, str | None]] = set()

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Setup, test and teardown: a test that passes does so in the middle, others anywhere."""
        if report.when == "call" or not report.passed:
            self._tell(report)

    def pytest_collectreport(self, report: Any) -> None:
        """A file that cannot be imported."""
        if report.failed:
            self._tell(report)

    def _tell(self, report: Any) -> None:
        what = report.nodeid, getattr(report, "when", None)
        if what in self._told:  # each process fails to import the same file
            return
        self._told.add(what)
        row = {"test": report.nodeid, "outcome": report.outcome}
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            text = report.longreprtext
            row |= {"message": (crash.message if crash else text)[:500], "told": text[-3000:]}
        with self._file.open("a", encoding="utf-8") as out:
            print(json.dumps(row), file=out)
