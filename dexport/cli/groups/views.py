"""Reports for other readers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dexport.cli.headings import option
from dexport.cli.parameters import OutputPath


@dataclass(frozen=True)
class Views:
    """Files that show a report to other readers."""

    junit: Path | None
    markdown: Path | None
    html: Path | None


views = (
    option("--junit", type=OutputPath(), help="Write the report as JUnit XML for CI."),
    option("--markdown", type=OutputPath(), help="Write the report for a pull request."),
    option("--html", type=OutputPath(), help="Write the report as one page that needs nothing else."),
)
