"""``dexport report`` and ``dexport baseline``."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from dexport.cli.groups.views import Views, views
from dexport.cli.headings import command, option
from dexport.cli.option_group import OptionGroup
from dexport.cli.parameters import PATH, OutputPath
from dexport.errors import GateError


@command("report")
@click.argument("report", type=PATH)
@OptionGroup("written", "Forms", Views, views)
@option("--baseline", type=PATH, help="Compare with this file.")
def report_command(report: Path, written: Views, baseline: Path | None) -> None:
    """Show a stored report of `dexport validate` in other forms; exit with 1 where a gate failed.

    Without an option, Markdown is printed.
    """
    from dexport.validate.report import views
    from dexport.validate.report.baseline import check_same, judged, read_baseline
    from dexport.validate.report.document import acceptable, read_report

    content = read_report(report)
    if baseline is not None:
        held = read_baseline(baseline)
        check_same(held, content)
        content = judged(content, held)
    views.write_views(content, junit=written.junit, markdown=written.markdown, html=written.html)
    if not any((written.junit, written.markdown, written.html)):
        click.echo(views.markdown(content), nl=False)
    sys.exit(0 if acceptable(content) else GateError.exit_code)


@click.group("baseline")
def baseline_group() -> None:
    """Files that hold what a validation measured, for later ones to be held to."""


@baseline_group.command("update")
@click.argument("source", type=PATH)
@option("-o", "--output", type=OutputPath(), required=True, help="The baseline's file, to commit.")
def baseline_update_command(source: Path, output: Path) -> None:
    """Write the baseline of a validation: SOURCE is a stored report, or a bundle whose manifest records one."""
    from dexport.validate.report.baseline import update

    written = update(source, output)
    click.echo(f"{output}: {len(written.content['metrics'])} metrics of {written.content['date']}")
