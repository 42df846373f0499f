"""What ``dexport diff`` found."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from dexport.cli.terminal import colored, figure, out
from dexport.verdict import PASSED, lossy_text

if TYPE_CHECKING:
    from dexport.validate.compare.diff import Diff, Finding

DIFFERENCES = 6
"""Differences of a block that are shown."""
KINDS = {
    "export": "the export itself departs from PyTorch",
    "altered": "the file computes something else than recipe and checkpoint",
    "precision": "rounding or overflow",
    "inexact": "too far from the reference",
    "gathered": "no block is to blame: the errors of all add up; the largest is here",
}


def print_diff(result: Diff) -> None:
    """What ``dexport diff`` found: the blocks, then what is wrong first, then what would mend it."""
    title = f"{result.bundle} against {result.reference}, {result.inputs}; gate {result.gate} {result.allowed:g}"
    table = Table("block", "own error", "explained", "unexplained", "propagated", "result", title=title)
    for block in result.blocks:
        verdict = "pass" if block.passed else "FAIL" if block.finite else "FAIL: NaN or Inf"
        errors = (block.own, block.expected, block.unexplained, block.propagated)
        table.add_row(block.path or "outside of blocks", *map(figure, errors), colored(verdict))
    out.print(table)
    out.print(f"outputs: relative L2 {figure(result.outputs)}")
    if result.pytorch:
        worst = max(result.pytorch.values())
        out.print(
            f"PyTorch: within {worst:.1e} of the reference at {len(result.pytorch)} of {len(result.blocks)} blocks"
        )
    for note in result.notes:
        out.print(f"not compared: {note}", soft_wrap=True)
    if result.finding is None:
        lost = "" if result.status == PASSED else f"; {lossy_text(result.loss)}"
        found = (f"{result.bundle}: ", colored(result.status), f", nothing found{lost}")
        out.print(Text.assemble(*found), soft_wrap=True)
        return
    _print_finding(result.finding)
    if result.others:
        out.print("also bad: " + ", ".join(path or "outside of blocks" for path in result.others), soft_wrap=True)
    if result.mend is not None:
        mend = result.mend
        options = " ".join(f"--island '{pattern}'" for pattern in mend.islands)
        before, after = (figure(max(errors.values())) for errors in (mend.before, mend.after))
        out.print(
            f"{'fix' if mend.enough else 'not enough'}: {options}: own error {before} -> "
            f"{after}, outputs {figure(mend.output_before)} -> {figure(mend.output_after)} (tried out)",
            soft_wrap=True,
        )


def _print_finding(finding: Finding) -> None:
    found = f": {finding.block or 'outside of blocks'}: {KINDS[finding.kind]}"
    out.print(Text.assemble(("first bad block", "red"), found))
    op = finding.op
    if op is not None:
        out.print(
            f"  operation {op.node} ({op.op_type}, stored as {op.dtype}): own error {figure(op.own)}; largest value "
            f"{op.largest_actual:.4g}, reference {op.largest:.4g}; {op.not_finite} of {op.size} values NaN or Inf",
            soft_wrap=True,
        )
    for difference in finding.differences[:DIFFERENCES]:
        out.print(f"  {difference.node}: {difference.text}", soft_wrap=True)
    if len(finding.differences) > DIFFERENCES:
        out.print(f"  and {len(finding.differences) - DIFFERENCES} more differences")
