"""A plugin of pytest, `-p benchmarks.ledger --ledger FILE`: each test as it begins and as it ends, a line each.

A JUnit file is written at the end alone, which a run that is killed does not reach.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import pytest

COLLECTED, BEGUN, PASSED, SKIPPED, FAILED = "collected", "begun", "passed", "skipped", "failed"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--ledger", metavar="FILE", help="write each test's beginning and end to this file")
    parser.addoption("--only", metavar="FILE", help="run the tests that are named in this file, a line each")


def pytest_configure(config: pytest.Config) -> None:
    is_worker = hasattr(config, "workerinput")  # of pytest-xdist, whose reports arrive in the first process
    if config.option.ledger and not is_worker:
        config.pluginmanager.register(_Writer(open(config.option.ledger, "w")))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.option.only:
        wanted = set(Path(config.option.only).read_text().splitlines())
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in wanted])
        items[:] = [item for item in items if item.nodeid in wanted]


class _Writer:
    def __init__(self, file: TextIO) -> None:
        self.file = file
        self.collected = False

    def write(self, test: str, state: str, message: str = "") -> None:
        self.file.write(json.dumps({"test": test, "state": state, "message": message}) + "\n")
        self.file.flush()

    def collect(self, tests: Iterable[str]) -> None:
        if not self.collected:  # every worker collects the same
            for test in tests:
                self.write(test, COLLECTED)
        self.collected = True

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        if session.items:  # with pytest-xdist the workers have them
            self.collect(item.nodeid for item in session.items)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        self.collect(ids)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.write(report.nodeid, FAILED, _reason(report))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.write(nodeid, BEGUN)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.write(report.nodeid, FAILED, _reason(report))
        elif report.skipped:
            self.write(report.nodeid, SKIPPED, str(report.longrepr[2] if isinstance(report.longrepr, tuple) else ""))
        elif report.when == "call":
            self.write(report.nodeid, PASSED)


def _reason(report: pytest.CollectReport | pytest.TestReport) -> str:
    """A line: the exception's first, else the last of what is told, as where a process crashed."""
    if crash := getattr(report.longrepr, "reprcrash", None):
        return crash.message.strip().partition("\n")[0][:300]
    return report.longreprtext.strip().rpartition("\n")[2][:300]


@dataclass
class Tests:
    """What became of them. `running` had begun and not ended when the run did."""

    passed: int = 0
    skipped: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    running: list[str] = field(default_factory=list)
    not_reached: list[str] = field(default_factory=list)

    @property
    def to_repeat(self) -> list[str]:
        return [*self.failed, *self.running, *self.not_reached]


def read(path: Path) -> Tests:
    """A ledger's tests; its last line may be cut off."""
    last: dict[str, dict[str, Any]] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        # A test that passed may still fail when it is torn down, and one that failed has nothing to add.
        if entry["test"] not in last or last[entry["test"]]["state"] != FAILED:
            last[entry["test"]] = entry
    tests = Tests()
    for name, entry in last.items():
        state = entry["state"]
        tests.passed += state == PASSED
        if state in (SKIPPED, FAILED):
            (tests.skipped if state == SKIPPED else tests.failed)[name] = entry["message"]
        elif state in (BEGUN, COLLECTED):
            (tests.running if state == BEGUN else tests.not_reached).append(name)
    return tests
