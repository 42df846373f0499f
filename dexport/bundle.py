"""The artifact: a folder with a manifest, hashes of every file, an atomic write and a checked load.

    out/
      manifest.json            what this is, how it was made, sha256 and size of every other file
      manifest.json.sig        a signature of the manifest, where it was packed with one
      model.onnx               a graph, for ONNX Runtime and everything that parses ONNX; <graph>.onnx for every other
      model.onnx.data          the weights of all graphs
      engines/<graph>-<flavour>-<targets>.plan
      reports/                 parity.json is the truth, parity.md a view of it
      networks/<name>/         the same for each network of a bundle that has several; their names are roles

Imports neither torch nor onnx, so that production code can load a bundle with little installed.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import re
import shutil
import stat
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dexport.contract import Graph, graphs_from_json
from dexport.drafts import ALIVE, FolderDraft, clear_remains
from dexport.errors import InputError, MachineError, UsageError
from dexport.files import DRAFT_NAME, open_regular, write_whole, writing_to
from dexport.hashing import sha256_of
from dexport.limits import shown
from dexport.onnx_reader import NotOnnxError, OnnxFile
from dexport.printable import printable
from dexport.signature import LARGEST, verify
from dexport.verdict import FAILED, LOSSY, Loss, caveats

SCHEMA_VERSION = 2
MANIFEST = "manifest.json"
SIGNATURE = "manifest.json.sig"
MODEL = "model.onnx"
MODEL_DATA = "model.onnx.data"
ENGINES = "engines"
REPORTS = "reports"
NETWORKS = "networks"
MAIN_GRAPH = "model"
NETWORK_NAME = re.compile(r"[a-z][a-z0-9_-]{0,63}(\.[0-9]{1,3})?")
"""A role, with a number where several networks play it."""
GRAPH_NAME = re.compile(r"[a-z][a-z0-9_-]{0,63}")
CHUNK = 1 << 20
"""Bytes that are copied at once."""


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
    def networks(self) -> dict[str, Network]:
        """The networks by name, the first of the first role first.

        They are not kept: each holds the bundle, and a private copy is to go with its last user, not with a later
        collection of what refers to itself.

        Raises:
            InputError: the manifest says something else.
        """
        with reading_manifest(self):
            entries = self.manifest[NETWORKS]
            for name, entry in entries.items():
                if not NETWORK_NAME.fullmatch(name) or not isinstance(entry, Mapping):
                    raise ValueError(f"network {printable(name)}")
            if not entries:
                raise ValueError("it has no networks")
        return {name: Network(self, name, entry) for name, entry in entries.items()}

    @property
    def network(self) -> Network:
        """The network of a bundle that has one, or the main one of several: the first."""
        return next(iter(self.networks.values()))

    @property
    def roles(self) -> dict[str, list[Network]]:
        """The networks by the role that they play."""
        found: dict[str, list[Network]] = {}
        for network in self.networks.values():
            found.setdefault(network.role, []).append(network)
        return found

    @property
    def program(self) -> Mapping[str, Any] | None:
        """Facts of how its networks are run, as JSON values; None where they are run by themselves only."""
        return self.manifest.get("program")

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
        """What who runs it has to know, of the whole and of each network, a sentence each; empty of a sound one."""
        entries = {name: network.manifest for name, network in self.networks.items()}
        if len(entries) == 1:
            entry = next(iter(entries.values()))
            return tuple(caveats({**self.manifest, "weights": entry.get("weights")}))
        found = list(caveats(self.manifest)) if self.manifest.get("validation") else []
        for name, entry in entries.items():
            found += [f"{name}: {caveat}" for caveat in caveats(entry)]
        return tuple(found or caveats(self.manifest))


@dataclass(frozen=True)
class Network:
    """A network of a bundle.

    Attributes:
        name: the role that it plays, with a number where several play it.
        manifest: its entry in the bundle's manifest.
    """

    bundle: Bundle = field(repr=False)
    name: str
    manifest: Mapping[str, Any] = field(repr=False)

    @property
    def role(self) -> str:
        return self.name.partition(".")[0]

    @property
    def path(self) -> Path:
        """The folder of its files."""
        return self.bundle.path / self.folder

    @property
    def folder(self) -> str:
        """Relative to the bundle; empty where it is the only network."""
        return network_folder(self.name, len(self.bundle.manifest[NETWORKS]))

    @functools.cached_property
    def graphs(self) -> dict[str, Graph]:
        """Its graphs by name.

        Raises:
            InputError: the manifest says something else, or lacks a file.
        """
        where = f"{self.bundle.path / MANIFEST}: {NETWORKS}.{self.name}.graphs"
        graphs = graphs_from_json(self.manifest.get("graphs"), where)
        files = self.bundle.manifest.get("files")  # a draft has none yet
        for name in graphs:
            if not GRAPH_NAME.fullmatch(name) or (files is not None and self.file(graph_file(name)) not in files):
                raise InputError(f"{where}: {printable(name)} is not in the bundle", hint="build the bundle again")
        if not graphs:
            raise InputError(f"{where} is empty", hint="build the bundle again")
        return graphs

    def entry(self, graph: str = "") -> Mapping[str, Any]:
        """What the manifest says of a graph besides its ports: by default of the main one."""
        with reading_manifest(self.bundle):
            return self.manifest["graphs"][graph or self.main_graph]

    @property
    def main_graph(self) -> str:
        """``model``, or the first of those that it has."""
        return MAIN_GRAPH if MAIN_GRAPH in self.graphs else next(iter(self.graphs))

    def model_path(self, graph: str = "") -> Path:
        """The ONNX file of a graph, by default of the main one."""
        return self.path / graph_file(graph or self.main_graph)

    def file(self, name: str) -> str:
        """A file of its folder as the bundle's manifest lists it."""
        return f"{self.folder}/{name}".lstrip("/")

    @property
    def status(self) -> str:
        return self.manifest["status"]

    @property
    def loss(self) -> Loss:
        """What was lost against PyTorch when it was built."""
        return Loss.of_json(self.manifest.get("loss"))


def network_of(bundle: Bundle, name: str | None, graph: str) -> Network:
    """A network of a bundle by name; without one, the main one where it plays its role alone.

    Raises:
        UsageError: there is no such network or graph, or several play the main role and none was named.
    """
    if name is not None and name not in bundle.networks:
        raise UsageError(f"{bundle.path} has no network {shown(name)}", hint=f"it has {', '.join(bundle.networks)}")
    network = bundle.network if name is None else bundle.networks[name]
    if name is None and len(bundle.roles[network.role]) > 1:
        raise UsageError(
            f"{bundle.path} holds {len(bundle.roles[network.role])} networks of the role {network.role}",
            hint=f"name one: --network {network.name}",
        )
    if graph and graph not in network.graphs:
        raise UsageError(f"{bundle.path} has no graph {shown(graph)}", hint=f"it has {', '.join(network.graphs)}")
    return network


def network_folder(name: str, count: int) -> str:
    """Where the files of a network lie in a bundle of ``count`` networks: at its top where it is the only one."""
    return "" if count == 1 else f"{NETWORKS}/{name}"


def graph_file(graph: str) -> str:
    """The ONNX file of a graph."""
    return f"{graph}.onnx"


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

    def commit(self, manifest: Mapping[str, Any]) -> Bundle:
        """Hash every file, write the manifest and move the draft to its place.

        Args:
            manifest: everything but ``schema`` and ``files``, which are added here.
        """
        files = hash_files(self.path)
        files.pop(ALIVE, None)
        complete = {"schema": SCHEMA_VERSION, **manifest, "files": files}
        text = json.dumps(complete, indent=2) + "\n"
        self.write_text(MANIFEST, text)
        self.publish()
        return Bundle(self.output, json.loads(text))  # as who loads it has it: lists, no tuples


def load_bundle(path: str | Path, require_signature: str | Path | None = None) -> Bundle:
    """Read a bundle and check the size and sha256 of every file before anything is deserialized.

    Where a signature is required, the bundle is a private copy of the bytes that were checked, which goes with it:
    whoever can write to the folder cannot exchange a file between the check and the use.

    Args:
        require_signature: PEM file of the ed25519 public key that must have signed the manifest.

    Raises:
        InputError: not a bundle, another schema, files that are missing, foreign, links or changed, or a graph whose
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
        UsageError: a signed bundle.
        MachineError: the bundle cannot be written.
    """
    check_changeable(bundle)
    complete = {**bundle.manifest, **fields}
    clear_remains(bundle.path, MANIFEST)
    write_whole(bundle.path / MANIFEST, json.dumps(complete, indent=2) + "\n")
    return Bundle(bundle.path, complete)


def check_changeable(bundle: Bundle) -> None:
    """Refuse a bundle whose manifest cannot be changed; see :func:`change_manifest`."""
    folder = bundle.path
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
        InputError: it is something else, or of another schema.
    """
    manifest = _known_manifest(content)
    if manifest is None:
        raise InputError(f"{name}: its {MANIFEST} is not a dexport manifest", hint="build or copy the bundle again")
    if manifest["schema"] != SCHEMA_VERSION:
        newer = manifest["schema"] > SCHEMA_VERSION
        raise InputError(
            f"{name} has manifest schema {manifest['schema']}; this dexport reads {SCHEMA_VERSION}",
            hint="pip install --upgrade dexport" if newer else "build the bundle again",
        )
    return manifest


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
