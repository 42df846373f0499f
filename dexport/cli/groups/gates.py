"""What a result is held to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dexport.cli.headings import Decorator, option
from dexport.cli.option_group import OptionGroup


@dataclass(frozen=True)
class Gates:
    """Limits as they were written, ``NAME=N``."""

    fail_under: tuple[str, ...]
    fail_over: tuple[str, ...]


accept_loss_of_report = option(
    "--accept-loss", is_flag=True, help="Exit with 0 although more is lost than is fit to ship; the report says so."
)


def gates(under: str, over: str, *more: Decorator, make: Any = Gates) -> OptionGroup:
    """``--fail-under`` and ``--fail-over`` with these helps."""
    return OptionGroup(
        "gates",
        "Gates",
        make,
        (
            option("--fail-under", multiple=True, metavar="NAME=N", help=under),
            option("--fail-over", multiple=True, metavar="NAME=N", help=over),
            *more,
        ),
    )
