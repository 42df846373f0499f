"""The artifact: a folder with a manifest, hashes of every file, an atomic write and a checked load.

    out/
      manifest.json            what this is, how it was made, sha256 and size of every other file
      model.onnx               the graph, for ONNX Runtime and everything that parses ONNX
      model.onnx.data          its weights
      engines/<flavour>-<targets>.plan
      reports/                 parity.json is the truth, parity.md a view of it
      parts/<name>/            whole bundles inside this one: a decoder, or the denoisers of a stitched bundle

Imports neither torch nor onnx, so that production code can load a bundle with little installed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from dexport.errors import InputError, MachineError, UsageError

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
MODEL = "model.onnx"
MODEL_DATA = "model.onnx.data"
ENGINES = "engines"
DRAFT = ".partial-"
REPORTS = "reports"
PARTS = "parts"
DECODER = "decoder"
STITCH = "stitch"
REPLACED = "replaced"
DISK_ERRORS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EEXIST,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.ENAMETOOLONG,
)


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk whose hashes have been checked.

    Attributes:
        path: its folder.
        manifest: the parsed ``manifest.json``.
    """

    path: Path
    manifest: Mapping[str, Any]

    @property
    def model_path(self) -> Path:
        return self.path / MODEL

    @property
    def parts(self) -> dict[str, Bundle]:
        """The bundles inside this one, by name; their hashes have been checked with this one's."""
        folders = {name: self.path / PARTS / name for name in self.manifest.get("parts", ())}
        return {name: Bundle(folder, _read_manifest(folder)) for name, folder in folders.items()}

    @property
    def stitch(self) -> list[tuple[Bundle, float]]:
        """The denoisers of a stitched bundle with their fractions of the trajectory; empty for any other."""
        parts = self.parts
        return [(parts[entry["part"]], entry["fraction"]) for entry in self.manifest.get(STITCH, ())]

    @property
    def failed(self) -> bool:
        """Whether a gate failed when it was built."""
        return self.manifest["status"] == "failed"


class Draft:
    """A bundle in the making: a temporary sibling of the output, renamed at the end.

    Use it as a context manager: an exception removes the draft and leaves what was at the output as it was. A killed
    process leaves a folder ``.NAME.partial-PID-*``, which the next build to the same output removes.

    Raises:
        UsageError: the output exists and ``force`` is not given, or is something else than a bundle.
        MachineError: the output's parent cannot be written, or has too little space.
    """

    def __init__(self, output: str | Path, *, force: bool = False, bytes_needed: int = 0) -> None:
        self.output = Path(output).absolute()
        with writing_to(self.output.parent):
            # What a link points to is replaced, never the link.
            if self.output.is_symlink():
                self.output = self.output.resolve()
            _clear_remains(self.output)
            _check_output(self.output, force)
            self.output.parent.mkdir(parents=True, exist_ok=True)
            prefix = f"{_draft_prefix(self.output)}{os.getpid()}-"
            self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=self.output.parent))
        self.path.chmod(0o755)
        free = shutil.disk_usage(self.path).free
        if free < bytes_needed:
            self.discard()
            raise MachineError(
                f"{self.output.parent} has {free / 1e9:.1f} GB free; "
                f"this build writes about {bytes_needed / 1e9:.1f} GB",
                hint="free some space or choose another output with -o",
            )

    @property
    def model_path(self) -> Path:
        return self.path / MODEL

    def __enter__(self) -> Draft:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()

    def write_text(self, relative: str, text: str) -> None:
        """Write a small file inside the draft."""
        with writing_to(self.path):
            target = self.path / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")

    def commit(self, manifest: Mapping[str, Any]) -> Bundle:
        """Hash every file, write the manifest and move the draft to its place.

        Args:
            manifest: everything but ``schema`` and ``files``, which are added here.
        """
        complete = {"schema": SCHEMA_VERSION, **manifest, "files": hash_files(self.path)}
        self.write_text(MANIFEST, json.dumps(complete, indent=2) + "\n")
        with writing_to(self.output.parent):
            replaced = self.output.with_name(f"{_draft_prefix(self.output)}{os.getpid()}-{REPLACED}")
            if self.output.exists():
                self.output.rename(replaced)
            try:
                self.path.rename(self.output)
            except OSError:
                if replaced.exists():
                    replaced.rename(self.output)
                raise
            shutil.rmtree(replaced, ignore_errors=True)
        return Bundle(self.output, complete)

    def discard(self) -> None:
        """Remove the draft, if it has not been committed."""
        shutil.rmtree(self.path, ignore_errors=True)


def load_bundle(path: str | Path) -> Bundle:
    """Read a bundle and check the size and sha256 of every file before anything is deserialized.

    Raises:
        InputError: not a bundle, a newer schema, or files that are missing, foreign or changed; each is named.
    """
    folder = Path(path)
    manifest = _read_manifest(folder)
    try:
        problems = _differences(folder, manifest["files"])
    except OSError as error:
        raise InputError(f"{folder} cannot be read: {error}", hint="build or copy it again") from error
    if problems:
        raise InputError(
            f"{folder} is not what was built:\n    " + "\n    ".join(problems),
            hint="build or copy it again; do not run it",
        )
    return Bundle(folder, manifest)


def hash_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and sha256 of every file below ``folder`` except the manifest, by POSIX path."""
    return {
        name: {"size": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)}
        for name in _file_names(folder)
    }


def sha256_of(path: Path) -> str:
    """Hexadecimal sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Turn a full, read-only or forbidden disk into a MachineError that names the folder (of a draft: its parent)."""
    folder = folder.parent if DRAFT in folder.name else folder
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise MachineError(
            f"{folder} cannot be written: {os.strerror(error.errno or 0)}",
            hint="free some space or choose another output with -o",
        ) from error


def _check_output(output: Path, force: bool) -> None:
    if not output.exists():
        return
    if not force:
        raise UsageError(f"{output} exists already", hint="choose another output with -o, or replace it with --force")
    if output.is_dir() and (not any(output.iterdir()) or _parse_manifest(output / MANIFEST) is not None):
        return
    raise UsageError(
        f"{output} exists and is not a dexport bundle, so --force does not replace it",
        hint="choose another -o",
    )


def _draft_prefix(output: Path) -> str:
    return f".{output.name}{DRAFT}"


def _clear_remains(output: Path) -> None:
    """Remove the drafts that killed builds to this output left behind; give back the bundle they had moved away."""
    prefix = _draft_prefix(output)
    if not output.parent.is_dir():
        return
    for entry in output.parent.iterdir():
        pid, dash, rest = entry.name.removeprefix(prefix).partition("-")
        if not (entry.name.startswith(prefix) and dash and pid.isdecimal()) or is_running(int(pid)):
            continue
        if rest == REPLACED and not output.exists():
            entry.rename(output)
        else:
            shutil.rmtree(entry, ignore_errors=True)


def is_running(pid: int) -> bool:
    """Whether there is a process of this id."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _read_manifest(folder: Path) -> dict[str, Any]:
    file = folder / MANIFEST
    if not file.is_file():
        raise InputError(f"{folder} is not a bundle: it has no {MANIFEST}", hint="make one with `dexport build`")
    manifest = _parse_manifest(file)
    if manifest is None:
        raise InputError(f"{file} is not a dexport manifest", hint="build or copy the bundle again")
    if manifest["schema"] > SCHEMA_VERSION:
        raise InputError(
            f"{folder} has manifest schema {manifest['schema']}; this dexport reads up to {SCHEMA_VERSION}",
            hint="pip install --upgrade dexport",
        )
    return manifest


def _parse_manifest(file: Path) -> dict[str, Any] | None:
    """A manifest of any schema version; None when the file is missing, unreadable or something else."""
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    known = isinstance(manifest, dict) and type(manifest.get("schema")) is int
    return manifest if known and isinstance(manifest.get("files"), dict) else None


def _differences(folder: Path, recorded: Mapping[str, Any]) -> list[str]:
    present = set(_file_names(folder))
    problems = [f"{name}: not in the manifest" for name in sorted(present - set(recorded))]
    for name, entry in recorded.items():
        if name not in present or not (folder / name).is_file():
            problems.append(f"{name}: missing")
        elif not isinstance(entry, dict) or (folder / name).stat().st_size != entry.get("size"):
            problems.append(f"{name}: size differs")
        elif sha256_of(folder / name) != entry.get("sha256"):
            problems.append(f"{name}: sha256 differs")
    return problems


def _file_names(folder: Path) -> list[str]:
    files = (
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()
    )
    return sorted(name for name in files if name != MANIFEST)
