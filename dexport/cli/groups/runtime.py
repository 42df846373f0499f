"""What runs a bundle."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dexport.choices import FLAVOURS, PROVIDERS
from dexport.cli.headings import option
from dexport.cli.option_group import OptionGroup
from dexport.cli.parameters import PATH, choice, require_signature


@dataclass(frozen=True)
class Runtime:
    """What runs the networks of a bundle."""

    provider: str
    decoder: Path | None
    require_signature: Path | None

    @property
    def players(self) -> dict[str, Path]:
        """Bundles for roles that a bundle leaves open."""
        return {} if self.decoder is None else {"decoder": self.decoder}


RUNTIME = OptionGroup(
    "runtime",
    "Running",
    Runtime,
    (
        option(
            "--provider",
            type=choice(*PROVIDERS, FLAVOURS[0]),
            default=PROVIDERS[0],
            show_default=True,
            help="What runs the networks.",
        ),
        option("--decoder", type=PATH, help="A decoder's bundle, where BUNDLE brings none."),
        require_signature,
    ),
)
