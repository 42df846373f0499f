"""What ``dexport sample`` made."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dexport.cli.terminal import out

if TYPE_CHECKING:
    from dexport.runtime.generate import Generated, GeneratedArray


def print_generated(generated: Generated) -> None:
    """What ``dexport sample`` made."""
    settings = generated.settings
    out.print(
        f"{generated.made} images in {generated.seconds:.1f} s"
        + (f", {generated.kept} kept" if generated.kept else "")
        + f": {generated.run}, seed {settings['seed']}, {generated.runner}"
    )
    out.print(f"  {generated.grid}\n  {generated.folder}")
    for name in generated.set_aside:
        out.print(f"  not of this run, and kept: {generated.folder / name}", soft_wrap=True)


def print_array(made: GeneratedArray) -> None:
    """What it made as an array."""
    out.print(f"{made.name} {list(made.shape)} in {made.seconds:.1f} s: {made.run}, {made.runner}\n  {made.file}")
