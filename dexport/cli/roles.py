"""Which network of a build a file belongs to."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from dexport.errors import UsageError

MAIN = ""
"""The network that the recipe names, whatever it does: a plain FILE is its."""
ROLE = re.compile(r"[a-z][a-z0-9_-]*(\.[0-9]+)?")
"""A role, with a number where several networks play it."""


def checkpoints_by_role(texts: Iterable[str], option: str = "--checkpoint") -> dict[str, str]:
    """``("w.pt", "decoder=vae.pt")`` -> ``{"": "w.pt", "decoder": "vae.pt"}``.

    A role before the first ``=`` decides, unless the whole is a file that is there.

    Raises:
        UsageError: a role twice, or one without a file.
    """
    found: dict[str, str] = {}
    for text in texts:
        role, equals, file = text.partition("=")
        if not equals or not ROLE.fullmatch(role) or Path(text).is_file():
            role, file = MAIN, text
        if not file:
            raise UsageError(
                f"{option} {text!r} names no file", hint=f"for example {option} {role or 'decoder'}=weights.pt"
            )
        if role in found:
            raise UsageError(
                f"{option}: {found[role]} and {file} are both for the {role or 'main network'}",
                hint=f"give one of them, or say whose the other is: {option} ROLE=FILE, such as decoder=vae.pt",
            )
        found[role] = file
    return found
