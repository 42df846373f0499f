"""What ``--quantize`` takes, and what a build gets for it."""

from __future__ import annotations

import pytest

from dexport.cli.quantize_spec import Scheme, parse_specs
from dexport.errors import UsageError


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ((), Scheme()),
        (("int8",), Scheme(int8="weight")),
        (("w8a8",), Scheme(int8="w8a8")),
        (("ternary",), Scheme(ternary=True)),
        (("none",), Scheme(ternary=False)),
        (("none,int8",), Scheme(int8="weight", ternary=False)),
        (("none", "w8a8"), Scheme(int8="w8a8", ternary=False)),
        (("int8", "int8"), Scheme(int8="weight")),
        (("map=a.json",), Scheme(precision_map="a.json")),
        (("map=a,b=1.json",), Scheme(precision_map="a,b=1.json")),
        (("map=a.json,ternary",), Scheme(precision_map="a.json", ternary=True)),
        (("budget=snr>=25",), Scheme(budget="snr>=25")),
        (("budget=snr>=25,size<=0.3",), Scheme(budget="snr>=25,size<=0.3")),
        (("budget=snr>=25,size<=0.3,none",), Scheme(budget="snr>=25,size<=0.3", ternary=False)),
        (("none, int8",), Scheme(int8="weight", ternary=False)),
    ],
)
def test_what_is_asked_for(texts: tuple[str, ...], expected: Scheme) -> None:
    assert parse_specs(texts) == expected


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (("int4",), r"--quantize 'int4' is not known"),
        (("",), r"--quantize '' is not known"),
        (("map=",), r"--quantize 'map=' is not known"),
        (("int8,w8a8",), r"--quantize int8 and --quantize w8a8 exclude each other"),
        (("ternary", "none"), r"--quantize ternary and --quantize none exclude each other"),
        (("map=a", "map=b"), r"--quantize map=a and --quantize map=b exclude each other"),
        (("int8,what",), r"--quantize 'what' is not known"),
    ],
)
def test_what_is_refused(texts: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        parse_specs(texts)
    assert caught.value.hint
