"""A bundle as one file: an uncompressed POSIX tar of which every byte is fixed by the bundle.

    comment record      "dexport 1 sha256 ...": of the manifest and the signature
    manifest.json
    manifest.json.sig   where it is signed
    every other file    in the order of their names

``tar xf`` unpacks it too. All headers follow from the names and sizes in the manifest, and a reader accepts no
others: there is no place for links, second members of one name, paths that lead elsewhere, or a changed byte. Nothing
is written under its final name before everything has been checked, and files are streamed.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from dexport.bundle import (
    MANIFEST,
    SIGNATURE,
    Bundle,
    Draft,
    load_bundle,
    parse_manifest,
    printable,
    refuse_inside_bundle,
    signature_of,
)
from dexport.drafts import clear_remains
from dexport.errors import InputError, UsageError
from dexport.files import open_regular, replacing, writing_to
from dexport.signature import LARGEST, read_signature, sign, verify

SUFFIX = ".dexport"
MARK = "dexport 1 sha256 "
BLOCK = tarfile.BLOCKSIZE
END = bytes(2 * BLOCK)
CHUNK = 1 << 20
LARGEST_MANIFEST = 64 << 20
LARGEST_FILE = 1 << 50
LONGEST_NAME = 255
AGAIN = "copy it again; do not unpack it with other tools"
OnProgress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Archive:
    """An archive of which every byte has been checked.

    Attributes:
        bytes: its size.
        manifest: of the bundle in it.
        key: ed25519 public key of the signature, hexadecimal; None where it is not signed. Whether it is the right one
            is known only where one was required.
    """

    path: Path
    bytes: int
    manifest: Mapping[str, Any]
    key: str | None


def pack(
    path: str | Path,
    output: Path,
    *,
    sign_key: Path | None = None,
    force: bool = False,
    on_progress: OnProgress = lambda _done, _total, _detail: None,
) -> Archive:
    """Write a bundle as an archive; the same bundle and key give the same bytes.

    Args:
        path: the bundle's folder; its hashes are checked before and while it is copied.
        sign_key: PEM file of a private ed25519 key; without it, a signature that the bundle has is kept.
        on_progress: told (bytes done, bytes in all, file).

    Raises:
        UsageError: the output exists and ``force`` is not given, or lies in a bundle.
        InputError: not a bundle, or one that cannot be an archive.
        MachineError: the disk is full or cannot be written.
    """
    if output.is_dir() or (output.exists() and not force):
        raise UsageError(
            f"{output} exists already", hint="choose another output with -o, or replace a file with --force"
        )
    refuse_inside_bundle(output)
    bundle = load_bundle(path)
    manifest = (bundle.path / MANIFEST).read_bytes()
    signature = sign(manifest, sign_key) if sign_key is not None else signature_of(bundle.path)
    key = _key(signature, bundle.path)
    files = _checked_files(parse_manifest(manifest, bundle.path), bundle.path)
    clear_remains(output.parent, output.name)
    with replacing(output, overwrite=force) as file:
        _write_start(file, manifest, signature)
        total, done = sum(size for size, _ in files.values()), 0
        for name, (size, sha256) in files.items():
            on_progress(done, total, name)
            file.write(_header(name, size))
            with open_regular(bundle.path / name) as source:
                copied = _copy(source, size, file, bundle.path)
            if copied != sha256:
                raise InputError(f"{bundle.path}: {name} changed while it was packed", hint="pack it again")
            file.write(_padding(size))
            done += size
        file.write(END)
        length = file.tell()
    return Archive(output, length, bundle.manifest, key)


def check(
    path: str | Path,
    require_signature: str | Path | None = None,
    on_progress: OnProgress = lambda _done, _total, _detail: None,
) -> Archive:
    """Check every byte of an archive; nothing is written.

    Raises:
        InputError: not an archive, changed, or not signed as required.
    """
    return _read(Path(path), require_signature, None, on_progress)


def unpack(
    path: str | Path,
    output: Path,
    *,
    require_signature: str | Path | None = None,
    force: bool = False,
    on_progress: OnProgress = lambda _done, _total, _detail: None,
) -> Bundle:
    """Check an archive and write the bundle in it as a folder, whole or not at all.

    Args:
        require_signature: PEM file of the public key that must have signed it.

    Raises:
        UsageError: the output exists and ``force`` is not given, or it is something else than a bundle.
        InputError: not an archive, changed, or not signed as required.
        MachineError: the disk is full or cannot be written.
    """
    source = Path(path)
    needed = source.stat().st_size if source.is_file() else 0
    with Draft(output, force=force, bytes_needed=needed) as draft, writing_to(draft.path):
        archive = _read(source, require_signature, draft.path, on_progress)
        draft.publish()
    return Bundle(draft.output, archive.manifest)


def is_archive(path: str | Path) -> bool:
    """Whether a file starts like an archive."""
    try:
        with open_regular(path) as file:
            return file.read(2 * BLOCK)[BLOCK:].partition(b"comment=")[2].startswith(MARK.encode())
    except OSError:
        return False


def _read(path: Path, require_signature: str | Path | None, target: Path | None, on_progress: OnProgress) -> Archive:
    try:
        opened = open_regular(path)
    except OSError as error:
        raise InputError(
            f"{path} cannot be read: {error.strerror}", hint="name an archive of `dexport pack`"
        ) from error
    with opened as file:
        length = os.fstat(file.fileno()).st_size
        content, signature = _read_start(file, path)
        if require_signature is not None:
            verify(content, signature, require_signature, path)
        key = _key(signature, path)
        manifest = parse_manifest(content, path)
        files = _checked_files(manifest, path)
        expected = file.tell() + sum(len(_header(name, size)) + _padded(size) for name, (size, _) in files.items())
        if length != expected + len(END):
            raise InputError(f"{path} has {length:,} bytes, expected {expected + len(END):,}", hint=AGAIN)
        if target is not None:
            _write(target, MANIFEST, content)
            if signature is not None:
                _write(target, SIGNATURE, signature)
        for name, (size, sha256) in files.items():
            on_progress(file.tell(), length, name)
            _expect(file, _header(name, size), path, f"the header of {name}")
            if _extract(file, size, target and target / name, path) != sha256:
                raise InputError(f"{path}: sha256 of {name} differs", hint=AGAIN)
            _expect(file, _padding(size), path, f"the end of {name}")
        _expect(file, END, path, "the end")
    return Archive(path, length, manifest, key)


def _write_start(file: IO[bytes], manifest: bytes, signature: bytes | None) -> None:
    file.write(_comment(manifest, signature))
    for name, content in ((MANIFEST, manifest), (SIGNATURE, signature)):
        if content is not None:
            file.write(_header(name, len(content)) + content + _padding(len(content)))


def _read_start(file: IO[bytes], path: Path) -> tuple[bytes, bytes | None]:
    """The manifest and the signature, held to the digest in the comment."""
    comment = file.read(2 * BLOCK)
    manifest = _small_member(file, MANIFEST, LARGEST_MANIFEST, path)
    if manifest is None:
        raise InputError(
            f"{path} is not an archive of `dexport pack`", hint="make one with `dexport pack BUNDLE -o FILE`"
        )
    signature = _small_member(file, SIGNATURE, LARGEST, path)
    if comment != _comment(manifest, signature):
        raise InputError(f"{path}: the manifest or its signature was changed", hint=AGAIN)
    return manifest, signature


def _small_member(file: IO[bytes], name: str, largest: int, path: Path) -> bytes | None:
    """The next member if it has this name; else None, and the file is where it was."""
    start = file.tell()
    block = file.read(BLOCK)
    try:
        size = tarfile.TarInfo.frombuf(block, "utf-8", "strict").size
        known = 0 <= size <= largest and block == _header(name, size)
    except (tarfile.HeaderError, ValueError):
        known = False
    if not known:
        file.seek(start)
        return None
    content = file.read(size)
    if len(content) != size:
        raise InputError(f"{path} ends in the middle of {name}", hint=AGAIN)
    _expect(file, _padding(size), path, f"the end of {name}")
    return content


def _checked_files(manifest: Mapping[str, Any], name: str | Path) -> dict[str, tuple[int, str]]:
    """Size and sha256 of each file in the order of an archive, all of them inside of the bundle."""
    files: dict[str, tuple[int, str]] = {}
    for file, entry in sorted(manifest["files"].items()):
        facts: Any = entry if isinstance(entry, dict) else {}
        size, sha256 = facts.get("size"), facts.get("sha256")
        typed = isinstance(size, int) and not isinstance(size, bool) and isinstance(sha256, str)
        if not typed or not 0 <= size <= LARGEST_FILE or not _is_inside(file):
            raise InputError(
                f"{name}: its {MANIFEST} has an entry that no bundle has: {printable(file)}", hint="do not use it"
            )
        files[file] = size, sha256
    folders = {parent.as_posix() for file in files for parent in PurePosixPath(file).parents}
    if both := sorted(folders & set(files)):
        raise InputError(f"{name}: {both[0]} is a file and a folder in its {MANIFEST}", hint="do not use it")
    return files


def _is_inside(name: str) -> bool:
    """A plain relative path, the same on every system, of a file that has no part of its own in an archive."""
    parts = name.split("/")
    return (
        name.isprintable()
        and not any(part in ("", ".", "..") or len(part.encode()) > LONGEST_NAME for part in parts)
        and not set(name) & set('\\:*?"<>|')
        and name not in (MANIFEST, SIGNATURE)
        and len(name.encode()) <= 4 * LONGEST_NAME
    )


def _comment(manifest: bytes, signature: bytes | None) -> bytes:
    digest = hashlib.sha256(manifest + (signature or b"")).hexdigest()
    return tarfile.TarInfo.create_pax_global_header({"comment": MARK + digest})


def _header(name: str, size: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.size = size
    return member.tobuf(tarfile.PAX_FORMAT, "utf-8", "strict")


def _padding(size: int) -> bytes:
    return bytes(-size % BLOCK)


def _padded(size: int) -> int:
    return size + -size % BLOCK


def _key(signature: bytes | None, name: Path) -> str | None:
    return None if signature is None else read_signature(signature, name)[0]


def _expect(file: IO[bytes], content: bytes, path: Path, what: str) -> None:
    if file.read(len(content)) != content:
        raise InputError(f"{path}: {printable(what)} differs", hint=AGAIN)


def _extract(file: IO[bytes], size: int, target: Path | None, path: Path) -> str:
    if target is None:
        return _copy(file, size, None, path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("xb") as out:
        return _copy(file, size, out, path)


def _copy(source: IO[bytes], size: int, target: IO[bytes] | None, name: Path) -> str:
    """Copy ``size`` bytes; their sha256."""
    digest = hashlib.sha256()
    while size:
        chunk = source.read(min(size, CHUNK))
        if not chunk:
            raise InputError(f"{name} ends too early", hint="copy it again")
        digest.update(chunk)
        if target is not None:
            target.write(chunk)
        size -= len(chunk)
    return digest.hexdigest()


def _write(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
