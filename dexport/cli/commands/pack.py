"""``dexport pack`` and ``dexport unpack``."""

from __future__ import annotations

from pathlib import Path

import click

from dexport.cli.app import print_json
from dexport.cli.headings import command, option
from dexport.cli.parameters import PATH, as_json_beside_progress, require_signature
from dexport.errors import UsageError


@command("pack")
@click.argument("bundle", type=PATH)
@option("-o", "--output", type=PATH, help="The archive. [default: BUNDLE.dexport]")
@option(
    "--sign",
    "sign_key",
    type=PATH,
    metavar="KEY.pem",
    help="Sign the manifest, which hashes every file, with this private ed25519 key.",
)
@option(
    "--triton",
    "repository",
    type=PATH,
    metavar="DIR",
    help="Instead of an archive: models of the Triton Inference Server, in this model repository.",
)
@option("--force", is_flag=True, help="Replace an existing archive, or the bundle's models.")
@as_json_beside_progress
def pack_command(
    bundle: Path, output: Path | None, sign_key: Path | None, repository: Path | None, force: bool, as_json: bool
) -> None:
    """Write a bundle as one file, the same bytes every time; `dexport unpack` checks it and gives the folder back.

    Or, with --triton, as models of the Triton Inference Server: the denoiser, and a pipeline that makes pictures.
    """
    from dexport.archive import SUFFIX, pack
    from dexport.cli.commands.pack_printer import print_models, print_packed
    from dexport.cli.terminal import Progress
    from dexport.model_repository import pack_for_triton

    if repository is not None:
        if output is not None or sign_key is not None:
            raise UsageError("--triton writes no archive", hint="leave out -o and --sign")
        models = pack_for_triton(bundle, repository, force=force)
        print_json(vars(models)) if as_json else print_models(models)
        return
    with Progress() as progress:
        progress.start("pack")
        packed = pack(
            bundle,
            output or Path(f"{bundle.absolute().name}{SUFFIX}"),
            sign_key=sign_key,
            force=force,
            on_progress=progress.advance,
        )
    facts = {"archive": packed.path, "bytes": packed.bytes, "key": packed.key}
    print_json(facts) if as_json else print_packed(packed)


@command("unpack")
@click.argument("archive", type=PATH)
@option("-o", "--output", type=PATH, help="Folder of the bundle. [default: its stem]")
@require_signature
@option("--force", is_flag=True, help="Replace an existing bundle.")
@option("--json", "as_json", is_flag=True, help="Print the manifest as JSON; progress goes to stderr.")
def unpack_command(
    archive: Path, output: Path | None, require_signature: Path | None, force: bool, as_json: bool
) -> None:
    """Check every byte of an archive, then give the bundle's folder back."""
    from dexport.archive import unpack
    from dexport.cli.terminal import Progress

    with Progress() as progress:
        progress.start("unpack")
        bundle = unpack(
            archive,
            output or Path(archive.stem),
            require_signature=require_signature,
            force=force,
            on_progress=progress.advance,
        )
    print_json(bundle.manifest) if as_json else click.echo(f"{bundle.path}: unpacked, hashes verified")
