"""The report as JUnit XML, which every CI system shows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from xml.etree import ElementTree

from dexport.choices import LEVELS
from dexport.printable import printable_values
from dexport.validate.report.parity_table import gate_text, word
from dexport.validate.report.views import text
from dexport.verdict import LOSSY


def junit(report: Mapping[str, Any]) -> str:
    """One suite per level, one test per check and gate. What was not run is skipped, never a success."""
    report = printable_values(report)  # XML cannot hold control characters
    root = ElementTree.Element("testsuites", name=f"dexport validate {report['bundle']['name']}: {report['verdict']}")
    for level in LEVELS:
        cases = list(_cases(report, level))
        if cases:
            _suite(root, level, report["date"], cases)
    if report["baseline"] is not None:
        _suite(root, "baseline", report["date"], [_change(change) for change in report["baseline"]["changes"]])
    for name in ("tests", "failures", "skipped"):
        root.set(name, str(sum(int(suite.get(name, "0")) for suite in root)))
    root.set("errors", "0")
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="utf-8", xml_declaration=True).decode() + "\n"


def _suite(root: ElementTree.Element, name: str, date: str, cases: list[ElementTree.Element]) -> None:
    suite = ElementTree.SubElement(root, "testsuite", name=name, tests=str(len(cases)), errors="0")
    suite.set("failures", str(sum(case.find("failure") is not None for case in cases)))
    suite.set("skipped", str(sum(case.find("skipped") is not None for case in cases)))
    suite.set("timestamp", date.removesuffix("+00:00"))
    for case in cases:
        case.set("classname", f"dexport.{name}")
    suite.extend(cases)


def _cases(report: Mapping[str, Any], level: str) -> Iterator[ElementTree.Element]:
    for gate in report["gates"]:
        if gate["level"] == level:
            shown = f"{text.value_of(gate)}, limit {text.limit_of(gate)}"
            detail = "; ".join(filter(None, (f"{gate['meaning']}: {shown}", gate["where"], gate["advice"])))
            if gate["verdict"] == LOSSY:
                detail += f"; {text.lost(report)}"
            yield _judged(f"gate {gate['metric']}", gate["verdict"], detail, report)
    if level == "op":
        for check in (report["ops"] or {}).get("checks", ()):
            yield _check(f"{check['op']} {check['dtype']} {check['module']}", check)
    if level == "forward":
        for part, parity in (report["forward"] or {}).items():
            for check in parity["checks"]:
                name = f"{part and f'{part}: '}{check['kind']}, batch {check['batch']}, {check['output']}"
                full = f"{name} ({check['runner']})" if check["kind"] == "batch consistency" else name
                yield _judged(full, word(check), _detail(check), report)
    for reason in report["not_run"]:
        about, _, why = reason.partition(": ")
        if about == level:
            case = _case(f"not run: {why}", None, "")
            ElementTree.SubElement(case, "skipped", message=why)
            yield case


def _judged(name: str, verdict: str, detail: str, report: Mapping[str, Any]) -> ElementTree.Element:
    """A case that fails unless it passed, or lost what was accepted; then its name says so."""
    if verdict == LOSSY and report["loss"]["accepted"] is True:
        return _case(f"{name} (lossy, accepted)", None, detail)
    return _case(name, None if verdict == "pass" else verdict, detail)


def _check(name: str, check: Mapping[str, Any]) -> ElementTree.Element:
    return _case(name, None if check["passed"] else "FAIL", _detail(check))


def _detail(check: Mapping[str, Any]) -> str:
    error = check["metrics"]["relative_l2"]
    shown = "not finite" if error is None else f"{error:.2e}"
    return f"relative L2 {shown}, gate {gate_text(check['gate'])}"


def _change(change: Mapping[str, Any]) -> ElementTree.Element:
    values = [
        "none" if change[name] is None else text.figure(change["metric"], change[name])
        for name in ("before", "now", "limit")
    ]
    detail = "{}: {} in the baseline, {} now, {} allowed".format(change["metric"], *values)
    return _case(change["metric"], "worse" if change["verdict"] == "worse" else None, detail)


def _case(name: str, failure: str | None, detail: str) -> ElementTree.Element:
    case = ElementTree.Element("testcase", name=name)
    if failure is not None:
        ElementTree.SubElement(case, "failure", message=detail, type=failure).text = detail
    elif detail:
        ElementTree.SubElement(case, "system-out").text = detail
    return case
