"""What ``dexport pack`` wrote."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dexport.cli.terminal import out

if TYPE_CHECKING:
    from dexport.archive import Archive
    from dexport.model_repository import Models


def print_packed(archive: Archive) -> None:
    """What ``dexport pack`` wrote."""
    signed = f", signed by {archive.key}" if archive.key else ", not signed"
    out.print(f"{archive.path}: {archive.bytes:,} bytes{signed}", soft_wrap=True)


def print_models(models: Models) -> None:
    """What ``dexport pack --triton`` wrote."""
    for folder in models.folders:
        out.print(f"{folder}", soft_wrap=True)
    for name, reason in models.left_out.items():
        out.print(f"not written: {name} on its own: {reason}", soft_wrap=True)
    out.print(f"tritonserver --model-repository {models.folders[0].parent}", soft_wrap=True)
