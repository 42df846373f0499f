"""Which network of a build a file belongs to."""

from __future__ import annotations

from collections.abc import Iterable

from dexport.errors import UsageError

DENOISER = "denoiser"
"""The network that the recipe names, whatever it does: a plain FILE is its."""


def known_roles() -> tuple[str, ...]:
    """Every role that ``ROLE=FILE`` can name."""
    from dexport.bundle import DECODER

    return (DENOISER, DECODER)


def checkpoints_by_role(texts: Iterable[str], option: str = "--checkpoint") -> dict[str, str]:
    """``("w.pt", "decoder=vae.pt")`` -> ``{"denoiser": "w.pt", "decoder": "vae.pt"}``.

    A role before the first ``=`` decides; any other name before it is the beginning of a file's name.

    Raises:
        UsageError: a role twice, or one without a file.
    """
    roles = known_roles()
    found: dict[str, str] = {}
    for text in texts:
        role, equals, file = text.partition("=")
        if not equals or role not in roles:
            role, file = DENOISER, text
        if not file:
            raise UsageError(f"{option} {text!r} names no file", hint=f"for example {option} {role}=weights.pt")
        if role in found:
            raise UsageError(
                f"{option}: {found[role]} and {file} are both for the {role}",
                hint=f"give one of them, or say whose the other is: {option} ROLE=FILE ({', '.join(roles)})",
            )
        found[role] = file
    return found
