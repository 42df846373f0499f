"""Gates: what passes, what fails, and what an interval leaves open."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dexport.errors import UsageError
from dexport.validate.features.evaluator import Evaluator, Features
from dexport.validate.gates import OF_VALIDATION, Gate, check_limits, delta_metrics, parse_limits

INCEPTION = Evaluator("inception", "FID", lambda _: Features(None))  # type: ignore[arg-type]
PIXELS = Evaluator("pixels", "Fréchet distance (8x8 pixels)", lambda _: Features(None))  # type: ignore[arg-type]
finite = st.floats(-1e6, 1e6)


@given(value=finite, limit=finite)
def test_a_value_is_judged_in_the_direction_of_its_metric(value: float, limit: float) -> None:
    assert (Gate("relative_l2", value, limit).verdict != "FAIL") == (value <= limit)
    assert (Gate("snr", value, limit).verdict != "FAIL") == (value >= limit)


@given(value=finite, limit=finite, below=st.floats(0, 1e3), above=st.floats(0, 1e3))
def test_an_estimate_passes_with_its_whole_interval_and_fails_by_its_value(
    value: float, limit: float, below: float, above: float
) -> None:
    gate = Gate("fid_delta", value, limit, low=value - below, high=value + above, count=100)
    expected = "FAIL" if value > limit else "pass" if value + above <= limit else "inconclusive"
    assert gate.verdict == expected
    if gate.verdict == "inconclusive":
        assert gate.advice


def test_how_many_images_would_settle_it() -> None:
    gate = Gate("fid_delta", 0.1, 0.3, low=-0.3, high=0.5, count=100)
    assert "about 400 images" in gate.advice  # an interval half as wide
    assert Gate("fid_delta", 0.1, 0.3, low=0.0, high=0.2, count=100).advice == ""
    assert "about 400 images" in Gate("fid_delta", 0.5, 0.3, low=0.1, high=0.9, count=100).advice
    assert "will not settle" in Gate("fid_delta", 0.3, 0.3, low=0.1, high=0.9, count=100).advice


def test_what_is_not_finite_fails_and_equality_passes() -> None:
    assert Gate("snr", math.nan, 25).verdict == Gate("relative_l2", None, 1).verdict == "FAIL"
    assert Gate("psnr", math.inf, 25).verdict == "pass"
    assert Gate("psnr", math.inf, 25).to_json()["value"] is None


def test_every_metric_can_be_given() -> None:
    under = [f"{name}=1" for name, metric in OF_VALIDATION.items() if metric.option == "--fail-under"]
    over = [f"{name}=1" for name, metric in OF_VALIDATION.items() if metric.option == "--fail-over"]
    assert set(parse_limits(under, over).given) == set(OF_VALIDATION)


def test_a_distance_has_the_name_of_its_network() -> None:
    assert delta_metrics(INCEPTION) == ("fid_delta", "kid_delta")
    levels = ("distribution",)
    check_limits(parse_limits((), ("fid_delta=0.3", "kid_delta=1e-3")), levels, INCEPTION)
    check_limits(parse_limits((), ("frechet_delta=0.3",)), levels, PIXELS)
    for limit, evaluator, hint in (
        ("fid_delta=1", PIXELS, "frechet_delta"),
        ("kernel_delta=1", INCEPTION, "kid_delta"),
    ):
        with pytest.raises(UsageError, match="is not measured with the evaluator") as caught:
            check_limits(parse_limits((), (limit,)), levels, evaluator)
        assert hint in caught.value.hint
