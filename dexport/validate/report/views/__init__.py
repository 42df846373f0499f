"""Views of a validation's report: what is in the JSON, for people and for CI. They compute nothing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dexport.files import write_whole
from dexport.validate.report.views.html import html
from dexport.validate.report.views.junit import junit
from dexport.validate.report.views.markdown import markdown

__all__ = ["html", "junit", "markdown", "write_views"]
VIEWS = {"junit": junit, "markdown": markdown, "html": html}


def write_views(report: Mapping[str, Any], **paths: Path | None) -> None:
    """Write views by their names in ``VIEWS``; each file is whole or not there.

    Raises:
        MachineError: a folder that cannot be written.
    """
    for name, path in paths.items():
        if path is not None:
            write_whole(path, VIEWS[name](report))
