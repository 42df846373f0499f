"""A committed baseline: what a validation measured once, and how far later ones may fall behind it."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dexport.bundle import MANIFEST, load_bundle
from dexport.errors import InputError, UsageError, free_name
from dexport.files import write_whole
from dexport.limits import shown
from dexport.validate.gates import LOSSY, PASS, WORSE, verdict_of
from dexport.validate.report import schema as report_schema
from dexport.validate.report.document import Run, read_report, summary
from dexport.validate.report.schema import check_document, read_json
from dexport.verdict import ACCEPT, Loss, lossy_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

SCHEMA = 2
KIND = "dexport baseline"
UPDATE = "make another with `dexport baseline update BUNDLE -o NEW.json`"
OWN = (
    "hold it to a baseline of its own: `dexport validate BUNDLE -o NEW_REPORT.json`, "
    "then `dexport baseline update NEW_REPORT.json -o NEW_BASELINE.json`"
)
OPTIONS = {"steps": "--steps", "sampler": "--sampler", "cfg_scale": "--cfg", "seed": "--seed"}
"""Settings that one option of ``dexport validate`` gives."""
DIGITS = 4
"""Significant ones, so that a file that is written again changes where the figures do."""
SAME, BETTER = "same", "better"


@dataclass(frozen=True)
class Tolerance:
    """How far a metric may move before it counts.

    Attributes:
        factor: an error or a size may grow by it; 0 where ``absolute`` decides.
        floor: smaller errors count as this: they are float32's rounding, which differs between processors.
        absolute: in the metric's own unit, plus the margins of two estimates.
        higher_is_better: of PSNR and SSIM.
    """

    factor: float = 0.0
    floor: float = 0.0
    absolute: float = 0.0
    higher_is_better: bool = False


TOLERANCES: Mapping[str, Tolerance] = {
    "relative_l2": Tolerance(factor=2.0, floor=1e-6),
    "psnr_db": Tolerance(absolute=3.0, higher_is_better=True),
    "ssim": Tolerance(absolute=0.005, higher_is_better=True),
    "lpips": Tolerance(absolute=0.005),
    "delta": Tolerance(),
    "kernel_delta": Tolerance(),
    "onnx_bytes": Tolerance(factor=1.02),
}
"""By the last word of a metric's name."""


@dataclass(frozen=True)
class Baseline:
    """A baseline file.

    Attributes:
        path: where it was read.
        content: its JSON: ``network``, ``settings``, ``metrics``, ``files``, ``tools``.
    """

    path: Path
    content: Mapping[str, Any]

    def describe(self, report: Mapping[str, Any]) -> dict[str, Any]:
        """Where it is, when it was made, and which tools and files are others now."""
        now = summary(report)
        return {
            "path": str(self.path),
            "date": self.content["date"],
            "dexport": self.content["dexport"],
            "tools": _differences(self.content["tools"], now["tools"]),
            "files": sorted(_differences(self.content["files"], now["files"])),
        }


@dataclass(frozen=True)
class Change:
    """One metric now and in the baseline; ``limit`` is the worst value that is still the same."""

    metric: str
    before: float | None
    now: float | None
    limit: float | None
    verdict: str
    text: str


def read_baseline(path: Path) -> Baseline:
    """Read a baseline file.

    Raises:
        UsageError: no such file.
        InputError: another file, another schema, or what no validation writes; naming the place.
    """
    if not path.is_file():
        raise UsageError(f"{path} does not exist", hint=f"make it with `dexport baseline update BUNDLE -o {path}`")
    content = read_json(path, UPDATE)
    if not isinstance(content, dict) or content.get("kind") != KIND:
        raise InputError(f"{path} is not a baseline", hint=UPDATE)
    if content.get("schema") != SCHEMA:
        raise InputError(
            f"{path} has baseline schema {shown(content.get('schema'))}; this dexport reads {SCHEMA}", UPDATE
        )
    check_document(content, report_schema.Baseline, path, UPDATE)
    return Baseline(path, content)


def check_comparable(baseline: Baseline, run: Run) -> None:
    """Refuse a baseline of another network or of other settings, before any work.

    Raises:
        InputError: naming what differs.
    """
    check_same(baseline, {"network": run.network(), "settings": run.settings()}, run.bundle.path)


def check_same(baseline: Baseline, report: Mapping[str, Any], bundle: Path | None = None) -> None:
    """Refuse a baseline that a report cannot be compared with; ``bundle`` is what the report is of."""
    for section in ("network", "settings"):
        now = json.loads(json.dumps(report[section]))
        differing = list(_paths(baseline.content[section], now))
        if differing:
            listed = "\n    ".join(
                f"{path}: {before!r} in the baseline, {after!r} here" for path, before, after in differing
            )
            raise InputError(
                f"{baseline.path} is the baseline of something else: its {section} differs:\n    {listed}",
                hint=_same_settings(baseline, [path for path, _, _ in differing], bundle or Path("BUNDLE"))
                if section == "settings"
                else OWN,
            )


def _same_settings(baseline: Baseline, differing: Sequence[str], bundle: Path) -> str:
    """The command that validates with the settings of the baseline, where options can give what differs; and the other
    way out."""
    settings = baseline.content["settings"]
    if not {path.partition(".")[0] for path in differing} <= {"levels", "labels", *OPTIONS}:
        return OWN
    options = [f"--level {level}" for level in settings.get("levels") or ()]
    if settings.get("labels") is not None:
        options.append(f"--classes {','.join(map(str, settings['labels']))}")
    options += [f"{option} {settings[name]}" for name, option in OPTIONS.items() if settings.get(name) is not None]
    if (measured := settings.get("distribution")) is not None:
        options.append(f"--reference REAL --evaluator {measured['evaluator']} --count {measured['count']}")
    words = [word for option in options for word in option.split(" ", 1)]
    command = shlex.join(["dexport", "validate", str(bundle), *words, "--baseline", str(baseline.path)])
    return f"`{command}` has the baseline's settings; or {OWN}"


def changes(baseline: Baseline, report: Mapping[str, Any]) -> tuple[Change, ...]:
    """Every metric of the baseline or of the report, in the order of the report."""
    before, now = baseline.content["metrics"], report["metrics"]
    return tuple(_change(name, before.get(name), now.get(name)) for name in dict.fromkeys((*now, *before)))


def judged(report: Mapping[str, Any], baseline: Baseline) -> dict[str, Any]:
    """The report with its comparison to a baseline, and with the verdict of its gates and of that comparison."""
    found = [asdict(change) for change in changes(baseline, report)]
    verdict = verdict_of([gate["verdict"] for gate in report["gates"]], [change["verdict"] for change in found])
    section = {**baseline.describe(report), "changes": found}
    return {**report, "baseline": section, "verdict": verdict, "passed": verdict == "passed"}


def update(source: Path, output: Path) -> Baseline:
    """Write the baseline of a stored report, or of the validation that a bundle's manifest records.

    Raises:
        UsageError: a bundle that was not validated, an output that is not ``.json``.
        InputError: a damaged report or record, or a run that failed: a baseline is what later runs are held to.
    """
    if output.suffix != ".json":
        raise UsageError(
            f"-o {output} is not a .json file", hint=f"for example -o {free_name(output.with_suffix('.json'))}"
        )
    if source.is_dir() or source.name == MANIFEST:
        validate = f"run `dexport validate {source}` first"
        found = load_bundle(source if source.is_dir() else source.parent).manifest.get("validation")
        if found is None:
            raise UsageError(f"{source} records no validation", hint=validate)
        if not isinstance(found, dict):
            raise InputError(f"{source} records no validation that could be read", hint=validate)
        check_document(found, report_schema.Record, f"the validation that {source} records", validate)
    else:
        found = summary(read_report(source))
    failed = [gate["metric"] for gate in found["gates"] if gate["verdict"] not in (PASS, LOSSY)]
    if failed or not found["gates"]:
        raise InputError(
            f"{source}: the validation did not pass ({', '.join(failed) or 'nothing was judged'})",
            hint="repair the bundle first; a baseline is what later runs are held to",
        )
    if found["verdict"] == LOSSY and found["loss"]["accepted"] is not True:
        raise InputError(
            f"{source}: the validation was lossy, which nobody accepted: {lossy_text(Loss.of_json(found['loss']))}",
            hint=f"validate it with {ACCEPT} if later runs are to be held to that",
        )
    kept = ("dexport", "date", "verdict", "loss", "network", "settings", "metrics", "files", "tools")
    content = {"kind": KIND, "schema": SCHEMA, **{name: found[name] for name in kept}}
    content["metrics"] = {name: _rounded(figures) for name, figures in sorted(found["metrics"].items())}
    write_whole(output, json.dumps(content, indent=2) + "\n")
    return Baseline(output, content)


def _change(name: str, before: Mapping[str, Any] | None, now: Mapping[str, Any] | None) -> Change:
    if before is None or now is None:
        if now is None:
            return Change(name, None if before is None else before["value"], None, None, WORSE, "no longer measured")
        return Change(name, None, now["value"], None, SAME, "new")
    old, new = before["value"], now["value"]
    if old is None or new is None:
        same = old is None and new is None
        verdict = SAME if same else WORSE if new is None else BETTER
        return Change(name, old, new, None, verdict, "not finite" if new is None else "finite now")
    tolerance = TOLERANCES[name.rpartition("/")[2]]
    sign = -1 if tolerance.higher_is_better else 1
    if tolerance.factor:
        base = max(old, tolerance.floor)
        limit, good = base * tolerance.factor, old / tolerance.factor
        text = f"x{new / old:.2f}" if old else f"{new:.2e}"
    else:
        margin = tolerance.absolute + (before.get("margin") or 0.0) + (now.get("margin") or 0.0)
        limit, good = old + sign * margin, old - sign * margin
        text = f"{new - old:+.3g}"
    if sign * new > sign * limit and not math.isclose(new, limit):
        verdict = WORSE
    else:
        noise = max(old, new) <= tolerance.floor
        verdict = BETTER if sign * new < sign * good and not noise else SAME
    return Change(name, old, new, limit, verdict, text)


def _rounded(figures: Mapping[str, float | None]) -> dict[str, float | None]:
    kept = {name: figures[name] for name in ("value", "margin") if name in figures}
    return {
        name: value if value is None or isinstance(value, int) else float(f"{value:.{DIGITS}g}")
        for name, value in kept.items()
    }


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, list[Any]]:
    return {
        name: [before.get(name), now.get(name)]
        for name in dict.fromkeys((*before, *now))
        if before.get(name) != now.get(name)
    }


def _paths(before: Any, now: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Where two JSON values differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in dict.fromkeys((*before, *now)):
            yield from _paths(before.get(name), now.get(name), f"{path}.{name}".strip("."))
    elif before != now:
        yield path, before, now
