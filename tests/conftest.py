"""Fixtures that several files share; Triton's interpreter, to be chosen before anything imports triton."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from safetensors.torch import save_file

from tests.bundles import other, plain, stitched  # noqa: F401 - fixtures
from tests.golden import Golden, load_golden

os.environ["TRITON_INTERPRET"] = "1"
os.environ["DEXPORT_CACHE"] = ""  # a test of a build is to build


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Slow tests run when they are asked for."""
    if "slow" in config.getoption("markexpr"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="slow: run it with `make test-slow`"))


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
