"""Where weights come from."""

from __future__ import annotations

from dataclasses import dataclass

from dexport.cli.headings import expert_option, option
from dexport.cli.option_group import OptionGroup
from dexport.cli.parameters import SEED
from dexport.cli.roles import MAIN, checkpoints_by_role


@dataclass(frozen=True)
class Weights:
    """Where weights come from.

    Attributes:
        checkpoints: addresses by role.
        seed: of random weights.
    """

    checkpoints: dict[str, str]
    init_from: str | None
    seed: int

    @property
    def main(self) -> str | None:
        """The checkpoint of the network that the recipe names."""
        return self.checkpoints.get(MAIN)


def _weights(checkpoints: tuple[str, ...], init_from: str | None, seed: int) -> Weights:
    return Weights(checkpoints_by_role(checkpoints), init_from, seed)


WEIGHTS = OptionGroup(
    "weights",
    "Weights",
    _weights,
    (
        option(
            "--checkpoint",
            "checkpoints",
            multiple=True,
            metavar="[ROLE=]FILE|HUB",
            help="A file, hf://owner/name/file, or owner/name on the Hub; decoder=FILE for the decoder. Without: "
            "seeded random weights.",
        ),
        expert_option(
            "--init-from",
            metavar="FILE|HUB",
            help="Inherit from another model's checkpoint what the recipe allows (LiT from DiT: all but attention).",
        ),
        expert_option("--seed", type=SEED, default=0, show_default=True, help="Seed of random weights."),
    ),
)
