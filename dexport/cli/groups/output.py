"""The bundle that a command makes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dexport.cli.headings import expert_option, option
from dexport.cli.option_group import OptionGroup
from dexport.cli.parameters import PATH


@dataclass(frozen=True)
class Output:
    """Where the bundle goes, and what is asked of it."""

    output: Path | None
    parity: bool
    accept_loss: bool
    force: bool
    as_json: bool
    cache: bool = True


parity = option("--parity/--no-parity", default=True, show_default=True, help="Compare with PyTorch and gate.")


accept_loss = option(
    "--accept-loss/--no-accept-loss",
    default=False,
    help="Exit with 0 although more is lost than is fit to ship; the manifest keeps that it was accepted.",
)


force = option("--force", is_flag=True, help="Replace an existing bundle.")


manifest_as_json = option(
    "--json", "as_json", is_flag=True, help="Print the manifest as JSON; progress goes to stderr."
)


OUTPUT = OptionGroup(
    "output",
    "Output",
    Output,
    (
        option("-o", "--output", type=PATH, help="Folder of the bundle. [default: RECIPE]"),
        parity,
        accept_loss,
        force,
        expert_option(
            "--cache/--no-cache", default=True, show_default=True, help="Take unchanged steps from earlier builds."
        ),
        manifest_as_json,
    ),
)


NEW_BUNDLE = OptionGroup(
    "output",
    "Output",
    Output,
    (
        option("-o", "--output", type=PATH, required=True, help="Folder of the new bundle."),
        parity,
        accept_loss,
        force,
        manifest_as_json,
    ),
)
