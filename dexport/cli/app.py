"""The command line's frame: its commands under headings, and how every one of them ends."""

from __future__ import annotations

import json
from typing import Any

import click

from dexport.cli.headings import Group
from dexport.exits import report, running
from dexport.verdict import ACCEPT, LOSSY, SHIPPABLE_SNR_DB, Loss, lossy_text
from dexport.version import __version__


class App(Group):
    """Ends every command with a message and the exit code of :mod:`dexport.exits`, whatever went wrong."""

    def main(self, *args: Any, **options: Any) -> Any:
        with running():
            return super().main(*args, **options)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.Abort, click.exceptions.Exit):
            raise
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - every command ends with a message
            ctx.exit(report(error))


@click.group(cls=App, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="dexport")
def main() -> None:
    """Diffusion backbones from PyTorch to ONNX and TensorRT, with proof that they still compute the same.

    Exit codes: 0 fine, 1 a gate failed, 2 usage, 3 environment, 4 bad input. 70 is a defect of dexport.
    """


def print_json(value: Any) -> None:
    """Print a result for programs."""
    click.echo(json.dumps(value, indent=2, default=str))


def say_lossy(acceptable: bool, status: str, loss: Loss) -> None:
    """Why a command ends with 1 although no gate failed."""
    if status == LOSSY and not acceptable:
        click.secho(f"error: more is lost than is fit to ship: {lossy_text(loss)}", fg="red", err=True)
        click.echo(f"fix: quantise less, such as --quantize 'budget=snr>={SHIPPABLE_SNR_DB:g}'; or {ACCEPT}", err=True)
