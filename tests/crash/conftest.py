"""Prints what the crash tests have tried."""

import pytest

from tests.support.figures import FIGURES


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the figures at the end of the run."""
    if FIGURES:
        terminalreporter.section("figures of the crash tests")
        for name, count in FIGURES.items():
            terminalreporter.write_line(f"{count:>9,}  {name}")
