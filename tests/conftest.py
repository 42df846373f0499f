"""Fixtures that several files share, and what must be chosen before torch and triton are imported."""

from __future__ import annotations

import os

if (
    "PYTEST_XDIST_WORKER" in os.environ
):  # one thread a worker: more would wait for each other, and take up to five times as long
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import save_file

from tests.bundles import fused, other, plain, stitched, trained  # noqa: F401 - fixtures
from tests.golden import Golden, load_golden
from tests.torch_operators import shared_tables

os.environ["TRITON_INTERPRET"] = "1"
os.environ["DEXPORT_CACHE"] = ""  # a test of a build is to build


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Slow tests run when they are asked for."""
    if "slow" in config.getoption("markexpr"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="slow: run it with `make test-slow`"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What tests measured (``record_property("measured", text)``), also where they ran in other processes."""
    for report in terminalreporter.stats.get("passed", []):
        for name, text in report.user_properties:
            if name == "measured":
                terminalreporter.write_line(f"measured: {text}")


@pytest.fixture(scope="session", autouse=True)
def torch_operators() -> Iterator[None]:
    with shared_tables():
        yield


@pytest.fixture(scope="session", params=["dit-s", "dico-s", "diffit-latent"])
def golden_name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def golden(golden_name: str) -> Golden:
    return load_golden(golden_name)


@pytest.fixture(scope="session")
def golden_checkpoint(golden: Golden, golden_name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden's weights in the official layout."""
    path = tmp_path_factory.mktemp("checkpoint") / f"{golden_name}.safetensors"
    save_file(golden.weights, path)
    return path
