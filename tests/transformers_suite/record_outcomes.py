"""pytest plugin: one JSON line for each test with its name, outcome and reason."""

import json
import os

import pytest


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    # A test counts once: not in the worker that ran it, not for its set-up, not for its subtests unless they fail.
    if os.environ.get("PYTEST_XDIST_WORKER") or (report.when != "call" and report.passed):
        return
    if hasattr(report, "context") and not report.failed:
        return
    reason = report.longrepr[2].removeprefix("Skipped: ") if report.skipped else ""
    with open(os.environ["HF_MOE_OUTCOMES"], "a") as file:
        name = ".".join(report.nodeid.split("::")[1:])
        file.write(json.dumps({"name": name, "outcome": report.outcome, "reason": reason}) + "\n")
