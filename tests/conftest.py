"""Options of the test run."""

from __future__ import annotations

import os

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="soaks run for ten minutes instead of seconds")


@pytest.fixture
def soak_seconds(request: pytest.FixtureRequest) -> float:
    """How long a soak may load its mesh."""
    return 600.0 if request.config.getoption("--long") else 25.0


@pytest.fixture
def registers_soak_seconds(request: pytest.FixtureRequest) -> float:
    """How long the soak of registers may go on."""
    return 600.0 if request.config.getoption("--long") else float(os.environ.get("VSTACK_SOAK", "120"))
