"""What a bundle was built from."""

from __future__ import annotations

from dataclasses import dataclass

from dexport.cli.headings import Decorator, option
from dexport.cli.option_group import OptionGroup


@dataclass(frozen=True)
class Recorded:
    """Where the things are that a bundle was built from; its manifest records all else."""

    checkpoint: str | None
    recipe: str | None
    profile: str | None = None


recorded_checkpoint = option(
    "--checkpoint", metavar="FILE", help="Where the weights of the build are now, if they were moved."
)


recorded_recipe = option("--recipe", metavar="FILE", help="The recipe file, where the bundle was built from one.")


def recorded(profile: Decorator) -> OptionGroup:
    """The options of a command that builds a bundle again; ``profile`` adds ``--profile``."""
    return OptionGroup(
        "recorded", "What BUNDLE was built from", Recorded, (recorded_checkpoint, recorded_recipe, profile)
    )
