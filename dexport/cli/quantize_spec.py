"""What ``--quantize`` takes, such as ``w8a8`` or ``budget=snr>=25,size<=0.3``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from dexport.errors import UsageError

NONE, MAP, BUDGET = "none", "map=", "budget="


@dataclass(frozen=True)
class Scheme:
    """What ``--quantize`` asks for, as the exporter knows it.

    Attributes:
        int8: a name of :data:`dexport.exporter.quantize.schemes.UNIFORM`.
        ternary: True to round to ternary, False to store ternary layers dense.
        precision_map: a file of layers and their schemes.
        budget: an SNR, a size, or both.
    """

    int8: str | None = None
    ternary: bool | None = None
    precision_map: str | None = None
    budget: str | None = None


def parse_specs(texts: Iterable[str]) -> Scheme:
    """``("none,int8",)`` -> ``Scheme(int8="weight", ternary=False)``.

    Which of them go together depends on the recipe, and is for the exporter to say.

    Raises:
        UsageError: an unknown form, or two that set the same thing.
    """
    found: dict[str, str | bool] = {}
    said: dict[str, str] = {}
    for text in texts:
        for spec in _split(text):
            field, value = _field_of(spec)
            if found.setdefault(field, value) != value:
                raise UsageError(
                    f"--quantize {said[field]} and --quantize {spec} exclude each other", hint="give one of them"
                )
            said.setdefault(field, spec)
    return Scheme(**found)  # type: ignore[arg-type]


def _words() -> dict[str, tuple[str, str | bool]]:
    from dexport.exporter.quantize.schemes import TERNARY, UNIFORM

    uniform: dict[str, tuple[str, str | bool]] = {scheme: ("int8", name) for name, scheme in UNIFORM.items()}
    return uniform | {TERNARY: ("ternary", True), NONE: ("ternary", False)}


def _split(text: str) -> Iterator[str]:
    """The forms of a list with commas; a comma before none of them belongs to a budget or to a file's name."""
    parts: list[str] = []
    for part in text.split(","):
        starts = part.strip() in _words() or part.strip().startswith((MAP, BUDGET))
        if starts or not parts or not parts[-1].startswith((MAP, BUDGET)):
            parts.append(part.strip())
        else:
            parts[-1] += f",{part}"
    return iter(parts)


def _field_of(spec: str) -> tuple[str, str | bool]:
    words = _words()
    if spec in words:
        return words[spec]
    for start, field in ((MAP, "precision_map"), (BUDGET, "budget")):
        if spec.startswith(start) and spec != start:
            return field, spec.removeprefix(start)
    raise UsageError(
        f"--quantize {spec!r} is not known", hint=f"give {', '.join(words)}, map=FILE, or budget=snr>=25,size<=0.3"
    )
