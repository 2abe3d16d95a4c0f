"""A pytest plugin that writes down each failure when it happens: what a killed or crashed run found is not lost.

The environment variable ``CLIPFAST_FAILURES`` names the file. Each line is a JSON object: ``{"started": test}`` or
``{"failed": test, "traceback": text}``.
"""

from __future__ import annotations

import json
import os
from typing import Any

import pytest


def _write(**line: Any) -> None:
    with open(os.environ["CLIPFAST_FAILURES"], "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def pytest_runtest_logstart(nodeid: str) -> None:
    """Name the test that starts: if the process ends in it, this is the last line."""
    _write(started=nodeid)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Keep the traceback of a test, or of what it needed before and after."""
    if report.failed:
        _write(failed=f"{report.nodeid} ({report.when})", traceback=report.longreprtext)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Keep the traceback of a file that could not be imported."""
    if report.failed:
        _write(failed=f"{report.nodeid} (import)", traceback=report.longreprtext)


def pytest_sessionfinish() -> None:
    """Say that no test runs any more."""
    _write(started=None)
