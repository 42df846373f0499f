"""The artifact: a folder with a manifest, hashes of every file, an atomic write and a checked load.

    out/
      manifest.json            what this is, how it was made, sha256 and size of every other file
      manifest.json.sig        a signature of the manifest, where it was packed with one
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
import json
import os
import shutil
import stat
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dexport.drafts import ALIVE, FolderDraft, clear_remains
from dexport.errors import InputError, MachineError, UsageError
from dexport.files import DRAFT_NAME, open_regular, write_whole, writing_to
from dexport.hashing import sha256_of
from dexport.onnx_reader import NotOnnxError, OnnxFile
from dexport.printable import printable
from dexport.signature import LARGEST, verify
from dexport.verdict import FAILED, LOSSY, Loss, caveats

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
SIGNATURE = "manifest.json.sig"
MODEL = "model.onnx"
MODEL_DATA = "model.onnx.data"
ENGINES = "engines"
REPORTS = "reports"
PARTS = "parts"
DECODER = "decoder"
CHUNK = 1 << 20
"""Bytes that are copied at once."""
PIXEL_SHUFFLE, TILES = "pixel-shuffle-", "-tiles-"
STITCH = "stitch"


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk whose hashes have been checked.

    Attributes:
        path: its folder.
        manifest: the parsed ``manifest.json``.
        private: holds the folder, where it is a private copy.
    """

    path: Path
    manifest: Mapping[str, Any]
    private: PrivateFolder | None = field(default=None, repr=False, compare=False)

    @property
    def source(self) -> Path:
        """The folder that was opened, which is another one than ``path`` where that is a private copy of it."""
        return self.path if self.private is None else self.private.source

    @property
    def model_path(self) -> Path:
        return self.path / MODEL

    @property
    def parts(self) -> dict[str, Bundle]:
        """The bundles inside this one, by name; their hashes have been checked with this one's."""
        with reading_manifest(self):
            names = [str(name) for name in self.manifest.get("parts", ())]
            files = self.manifest.get("files")  # a draft has none yet
            for name in names:
                if "/" in name or (files is not None and f"{PARTS}/{name}/{MANIFEST}" not in files):
                    raise ValueError(f"part {printable(name)} is not in it")
        folders = {name: self.path / PARTS / name for name in names}
        return {name: Bundle(folder, _read_manifest(folder), self.private) for name, folder in folders.items()}

    @property
    def stitch(self) -> list[tuple[Bundle, float]]:
        """The denoisers of a stitched bundle with their fractions of the trajectory; empty for any other."""
        parts = self.parts
        with reading_manifest(self):
            return [(parts[entry["part"]], float(entry["fraction"])) for entry in self.manifest.get(STITCH, ())]

    @property
    def status(self) -> str:
        """Of the whole: ``passed``, ``lossy``, ``failed`` or ``not verified``; see :mod:`dexport.verdict`."""
        return self.manifest["status"]

    @property
    def failed(self) -> bool:
        """Whether a gate failed when it was built."""
        return self.status == FAILED

    @property
    def loss(self) -> Loss:
        """What was lost against PyTorch when it was built."""
        return Loss.of_json(self.manifest.get("loss"))

    @property
    def acceptable(self) -> bool:
        """Whether nothing failed, and what was lost is fit to ship or was accepted."""
        return not self.failed and (self.status != LOSSY or self.manifest.get("accepted_loss") is True)

    @property
    def caveats(self) -> tuple[str, ...]:
        """What who runs it has to know, of itself and of its parts, a sentence each; empty of a sound one."""
        own = list(caveats(self.manifest))
        for name, part in self.parts.items():
            own += [f"{name}: {caveat}" for caveat in part.caveats]
        return tuple(own)


class Draft(FolderDraft):
    """A bundle in the making: a temporary sibling of the output, renamed at the end.

    Args:
        force: replace what is at the output, where ``replaceable`` says that this folder may be.
        bytes_needed: on the disk.
        replaceable: by default, bundles may be.

    A killed process leaves a folder ``.NAME.partial-RANDOM``, which the next build to the same output removes.

    Raises:
        UsageError: the output exists and ``force`` is not given, is something else than a bundle, or lies in a bundle;
            or it cannot be replaced, as a mount point.
        MachineError: the output's parent cannot be written, or has too little space.
    """

    SEAL = MANIFEST

    def __init__(
        self,
        output: str | Path,
        *,
        force: bool = False,
        bytes_needed: int = 0,
        replaceable: Callable[[Path], bool] | None = None,
    ) -> None:
        refuse_inside_bundle(Path(output).absolute())
        super().__init__(output, replaceable or _is_bundle, force=force, bytes_needed=bytes_needed)

    @property
    def model_path(self) -> Path:
        return self.path / MODEL

    def commit(self, manifest: Mapping[str, Any]) -> Bundle:
        """Hash every file, write the manifest and move the draft to its place.

        Args:
            manifest: everything but ``schema`` and ``files``, which are added here.
        """
        files = hash_files(self.path)
        files.pop(ALIVE, None)
        complete = {"schema": SCHEMA_VERSION, **manifest, "files": files}
        self.write_text(MANIFEST, json.dumps(complete, indent=2) + "\n")
        self.publish()
        return Bundle(self.output, complete)


def load_bundle(path: str | Path, require_signature: str | Path | None = None) -> Bundle:
    """Read a bundle and check the size and sha256 of every file before anything is deserialized.

    Where a signature is required, the bundle is a private copy of the bytes that were checked, which goes with it:
    whoever can write to the folder cannot exchange a file between the check and the use.

    Args:
        require_signature: PEM file of the ed25519 public key that must have signed the manifest.

    Raises:
        InputError: not a bundle, a newer schema, files that are missing, foreign, links or changed, or a graph whose
            weights lie elsewhere; each is named. Or it is not signed, signed with another key, or changed after it was
            signed.
        MachineError: a signature is required and the package cryptography is missing, or there is no space for a copy.
    """
    folder = Path(path)
    content = _manifest_bytes(folder)
    if require_signature is None:
        bundle = Bundle(folder, parse_manifest(content, folder))
    else:
        signature = signature_of(folder)
        verify(content, signature, require_signature, folder)
        bundle = _private_copy(folder, content, signature or b"")
    try:
        problems = _differences(bundle.path, bundle.manifest["files"])
        problems = problems or _unsafe_graphs(bundle.path, bundle.manifest["files"])
    except OSError as error:
        raise InputError(f"{folder} cannot be read: {error}", hint="build or copy it again") from error
    if problems:
        raise InputError(
            f"{folder} is not what was built:\n    " + "\n    ".join(problems),
            hint="build or copy it again; do not run it",
        )
    return bundle


def _private_copy(folder: Path, manifest: bytes, signature: bytes) -> Bundle:
    """A copy, which nobody else can write to, of everything in a bundle's folder; it is removed with its last user."""
    copy = Path(tempfile.mkdtemp(prefix="dexport-signed-"))
    private = PrivateFolder(folder, copy)
    try:
        for name in _file_names(folder):
            if (folder / name).is_symlink():
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                (copy / name).symlink_to("link")  # is refused by name with all else that is wrong
                continue
            _copy_file(folder / name, copy / name)
        (copy / MANIFEST).write_bytes(manifest)
        (copy / SIGNATURE).write_bytes(signature)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise InputError(f"{folder} cannot be read: {error}", hint="build or copy it again") from error
        raise MachineError(
            f"{copy.parent} has no space for a copy of {folder}, which a required signature needs",
            hint="free some space, or set TMPDIR to a folder on a larger disk",
        ) from error
    return Bundle(copy, parse_manifest(manifest, folder), private)


class PrivateFolder:
    """Removes the copy of a folder when nobody holds this any more, at the latest when the process ends."""

    def __init__(self, source: Path, copy: Path) -> None:
        self.source = source
        self._remove = weakref.finalize(self, shutil.rmtree, copy, ignore_errors=True)


def copy_bundle(bundle: Bundle, target: Path) -> None:
    """Copy what a bundle's manifest lists, and nothing else, to a folder that is not there yet.

    Raises:
        MachineError: the disk is full or cannot be written.
    """
    names = [MANIFEST, *bundle.manifest["files"]]
    if (bundle.path / SIGNATURE).is_file():
        names.append(SIGNATURE)
    with writing_to(target.parent):
        target.mkdir(parents=True)
        for name in names:
            _copy_file(bundle.path / name, target / name)


def _copy_file(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with open_regular(source, follow=False) as opened, target.open("xb") as copy:
        shutil.copyfileobj(opened, copy, CHUNK)


def change_manifest(bundle: Bundle, **fields: Any) -> Bundle:
    """Replace top-level fields of a manifest on disk; its files stay as they are.

    The new manifest takes the place of the old one in one step: a killed process leaves the bundle as it was.

    Raises:
        UsageError: a signed bundle, or a part of another one, whose hashes cover this manifest.
        MachineError: the bundle cannot be written.
    """
    check_changeable(bundle)
    complete = {**bundle.manifest, **fields}
    clear_remains(bundle.path, MANIFEST)
    write_whole(bundle.path / MANIFEST, json.dumps(complete, indent=2) + "\n")
    return Bundle(bundle.path, complete)


def check_changeable(bundle: Bundle) -> None:
    """Refuse a bundle whose manifest cannot be changed; see :func:`change_manifest`."""
    folder = bundle.path.resolve()  # a link to a part is that part
    if folder.parent.name == PARTS and (folder.parent.parent / MANIFEST).is_file():
        raise UsageError(
            f"{bundle.path} is a part of {folder.parent.parent}, whose hashes cover its manifest",
            hint="validate the whole, or leave the manifest as it is with --no-record",
        )
    if (folder / SIGNATURE).exists():
        raise UsageError(
            f"{bundle.path} is signed, and a changed manifest would not be", hint="leave it as it is with --no-record"
        )
    if not os.access(bundle.path, os.W_OK):
        raise MachineError(f"{bundle.path} cannot be written", hint="leave its manifest as it is with --no-record")


def hash_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and sha256 of every file below ``folder`` except the manifest and its signature, by POSIX path."""
    return {
        name: {"size": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)}
        for name in _file_names(folder)
    }


@contextlib.contextmanager
def reading_manifest(bundle: Bundle) -> Iterator[None]:
    """Turn a field that a manifest lacks, or that has another form, into an InputError that names the manifest."""
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise InputError(
            f"{bundle.path / MANIFEST} is incomplete: {type(error).__name__} {error}", hint="build the bundle again"
        ) from error


def refuse_inside_bundle(output: Path) -> None:
    """Refuse an output that would lie in the folder of a bundle.

    Raises:
        UsageError: it would.
    """
    for folder in Path(os.path.realpath(output)).parents:
        if _is_bundle(folder):
            raise UsageError(
                f"{output} would lie in the bundle {folder}, which holds nothing that its manifest does not list",
                hint="choose another output",
            )


def _is_bundle(folder: Path) -> bool:
    try:
        with open_regular(folder / MANIFEST) as file:
            return _known_manifest(file.read()) is not None
    except OSError:
        return False


def signature_of(folder: Path) -> bytes | None:
    """The content of a bundle's signature file; None where it has none."""
    file = folder / SIGNATURE
    if not file.is_file():
        return None
    with file.open("rb") as opened:
        return opened.read(LARGEST)


def parse_manifest(content: bytes, name: str | Path) -> dict[str, Any]:
    """A manifest of a schema that this version reads.

    Args:
        name: of the bundle, for messages.

    Raises:
        InputError: it is something else, or of a newer schema.
    """
    manifest = _known_manifest(content)
    if manifest is None:
        raise InputError(f"{name}: its {MANIFEST} is not a dexport manifest", hint="build or copy the bundle again")
    if manifest["schema"] > SCHEMA_VERSION:
        raise InputError(
            f"{name} has manifest schema {manifest['schema']}; this dexport reads up to {SCHEMA_VERSION}",
            hint="pip install --upgrade dexport",
        )
    return manifest


def pixel_shuffle(decoder: str) -> tuple[int, int] | None:
    """Factor and tiles of ``pixel-shuffle-N`` or ``pixel-shuffle-N-tiles-M``; None for another decoder.

    Raises:
        ValueError: something else than whole numbers from 1.
    """
    if not decoder.startswith(PIXEL_SHUFFLE):
        return None
    factor, _, tiles = decoder.removeprefix(PIXEL_SHUFFLE).partition(TILES)
    if min(int(factor), int(tiles or 1)) < 1:
        raise ValueError(f"decoder {printable(decoder)}")
    return int(factor), int(tiles or 1)


def _read_manifest(folder: Path) -> dict[str, Any]:
    return parse_manifest(_manifest_bytes(folder), folder)


def _manifest_bytes(folder: Path) -> bytes:
    if folder.is_file():
        raise InputError(
            f"{folder} is a file, and a bundle is a folder",
            hint=f"if it is an archive of `dexport pack`: dexport unpack {folder}",
        )
    file = folder / MANIFEST
    if not file.is_file():
        raise InputError(f"{folder} is not a bundle: it has no {MANIFEST}", hint="make one with `dexport build`")
    try:
        return file.read_bytes()
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}", hint="build or copy the bundle again") from error


def _known_manifest(content: bytes) -> dict[str, Any] | None:
    """A manifest of any schema version; None when it is something else."""
    try:
        manifest = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    known = isinstance(manifest, dict) and type(manifest.get("schema")) is int
    return manifest if known and isinstance(manifest.get("files"), dict) else None


def _differences(folder: Path, recorded: Mapping[str, Any]) -> list[str]:
    present = {name for name in _file_names(folder) if not _is_unfinished(folder, name)}
    problems = [f"{printable(name)}: not in the manifest" for name in sorted(present - set(recorded))]
    for name, entry in recorded.items():
        if name not in present or not (folder / name).is_file():
            problems.append(f"{printable(name)}: missing")
        elif (folder / name).is_symlink():
            problems.append(f"{printable(name)}: is a link, and a bundle holds its files itself")
        elif not isinstance(entry, dict) or (folder / name).stat().st_size != entry.get("size"):
            problems.append(f"{printable(name)}: size differs")
        elif sha256_of(folder / name) != entry.get("sha256"):
            problems.append(f"{printable(name)}: sha256 differs")
    return problems


def _unsafe_graphs(folder: Path, recorded: Mapping[str, Any]) -> list[str]:
    """Graphs that read more than a file beside them that the manifest lists, or that would grow beyond measure."""
    problems = []
    for name in recorded:
        if not name.endswith(".onnx"):
            continue
        place = name.rpartition("/")[0]
        try:
            graph = OnnxFile((folder / name).read_bytes())
            graph.check_expansion()
            tensors = graph.external_data()
        except NotOnnxError:
            continue  # has no weights anywhere; what runs it refuses it
        except ValueError as error:
            problems.append(f"{printable(name)}: {printable(error)}")
            continue
        for tensor in tensors:
            file = f"{place}/{tensor.location}".lstrip("/")
            if "/" in tensor.location or file not in recorded:
                where = f"in {printable(tensor.location)}, which the manifest does not list beside it"
            elif tensor.offset + (tensor.length or 0) > recorded[file]["size"]:
                where = f"behind the end of {printable(tensor.location)}"
            else:
                continue
            problems.append(f"{printable(name)}: the data of {printable(tensor.tensor)} lies {where}")
            break
    return problems


def _is_unfinished(folder: Path, name: str) -> bool:
    """What a killed change of a manifest left behind; nobody changes a signed one."""
    found = DRAFT_NAME.fullmatch(name)
    if found is None or found["name"] != MANIFEST or (folder / SIGNATURE).exists():
        return False
    return stat.S_ISREG((folder / name).lstat().st_mode)


def _file_names(folder: Path) -> list[str]:
    files = (
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()
    )
    return sorted(name for name in files if name not in (MANIFEST, SIGNATURE))
