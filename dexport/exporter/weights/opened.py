"""A checkpoint file of any kind, known by its content, with the state dicts that it holds."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dexport.errors import InputError, UsageError
from dexport.exporter.weights.address import INDEX_SUFFIXES, LISTED, SUFFIXES, TORCH_SUFFIXES, shards_of, shorten
from dexport.exporter.weights.containers import CONTAINERS, Fixed, Form, find_forms
from dexport.exporter.weights.file import CheckpointFile
from dexport.exporter.weights.safetensors_file import LENGTH, read_safetensors, read_shards
from dexport.exporter.weights.source import Origin, TensorSource
from dexport.exporter.weights.stored import Stored, Strided
from dexport.exporter.weights.torch_file import LegacyFile, TorchFile, ZipFile, reading
from dexport.exporter.weights.torchscript import is_torchscript, state_dict
from dexport.exporter.weights.zip_archive import LOCAL_MAGIC, ZipArchive

SAFETENSORS, TORCH, TORCHSCRIPT = "safetensors", "torch", "torchscript"
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
TAR_MAGIC, TAR_MAGIC_AT = b"ustar", 257
PICKLE = b"\x80"
PAGES = (b"<!doctype html", b"<html")
HEAD = 512


class Checkpoint:
    """One file, or an index and the files that it joins. They stay open as long as anything reads from them.

    Args:
        fixed: names in the network that an average may leave out.
        sha256: what the file must have; empty for any.

    Raises:
        InputError: not a whole checkpoint, one that must run code to be read, or not the one of that hash.
        UsageError: a file of another kind.
    """

    def __init__(self, path: Path, fixed: Fixed | None = None, sha256: str = "") -> None:
        self.path = path
        file = CheckpointFile(path)
        head = file.bytes_at(0, HEAD)
        shards: dict[Path, CheckpointFile] = {}
        names: dict[str, Path] = {}
        if path.name.endswith(INDEX_SUFFIXES):
            _refuse_other_kinds(path, head)
            names = read_shards(file)
            shards = {
                place: CheckpointFile(place) for place in shards_of(path, sorted({p.name for p in names.values()}))
            }
        self.files = (file, *shards.values())
        if sha256 and self.sha256 != sha256:
            raise InputError(
                f"{path} is not the checkpoint that the bundle was built from: its sha256 differs",
                hint="give the right one with --checkpoint",
            )
        self._torch: TorchFile | None = None
        if shards:
            self.kind, choices = _join(path, names, shards)
        else:
            self.kind, choices, self._torch = _load(file, head)
        with reading(file):
            found = [find_forms(loaded, fixed or Fixed()) for loaded in choices]
        self.forms = [form for forms, _ in found for form in forms]
        self.unread = found[0][1]
        if not self.unread and not any(form.known for form in self.forms):
            raise self._without_state_dict(choices[0])

    @property
    def sha256(self) -> str:
        """Of the file; of several, the hash of their names and hashes."""
        if len(self.files) == 1:
            return self.files[0].sha256
        lines = "".join(f"{file.path.name}\0{file.sha256}\n" for file in self.files)
        return hashlib.sha256(lines.encode()).hexdigest()

    def source(self, form: Form) -> TensorSource:
        """The tensors of one of the forms.

        Raises:
            InputError: one reaches beyond its file or its record.
        """
        tensors = {name: _placed(tensor, self._torch) for name, tensor in form.tensors.items()}
        size = sum(file.size for file in self.files)
        return TensorSource(tensors, self.files, Origin(self.kind, str(self.path), self.sha256, size, form.label))

    def default(self) -> TensorSource:
        """The form that comes first where no network says which one fits.

        Raises:
            InputError: that would leave out an average.
        """
        if self.unread and not (self.forms and self.forms[0].averaged):
            one = self.unread[0]
            raise InputError(
                f"{self.path} holds averaged weights ({one.label}) that cannot be taken: {one.reason}",
                hint="save them as a state dict",
            )
        return self.source(next(form for form in self.forms if form.known))

    def _without_state_dict(self, loaded: Any) -> InputError:
        if not isinstance(loaded, Mapping):
            return InputError(
                f"{self.path} holds a {type(loaded).__name__}, not a state dict",
                hint="save module.state_dict() with torch.save",
            )
        keys = [str(key)[:LISTED] if isinstance(key, str | int) else type(key).__name__ for key in loaded]
        others = "".join(f"; or name the one that is meant: {self.path}::{form.address}" for form in self.forms[:1])
        return InputError(
            f"{self.path} holds no state dict; its keys are: {', '.join(shorten(keys))}",
            hint=f"known: {', '.join(CONTAINERS)}{others}",
        )


Loaded = tuple[str, list[Any], TorchFile | None]


def _load(file: CheckpointFile, head: bytes) -> Loaded:
    """Kind, what the file holds (twice where names may be left out), and what finds its storages."""
    _refuse_other_kinds(file.path, head)
    size = LENGTH.unpack(head[: LENGTH.size])[0] if len(head) > LENGTH.size else 0
    if head[LENGTH.size : LENGTH.size + 1] == b"{" and size < file.size:
        return SAFETENSORS, read_safetensors(file), None
    if head.startswith(LOCAL_MAGIC):
        archive = ZipFile(ZipArchive(file))
        if is_torchscript(archive.archive):
            return TORCHSCRIPT, [state_dict(archive)], archive
        return TORCH, [archive.load()], archive
    if file.path.suffix == ".safetensors" and not head.startswith(PICKLE):
        return SAFETENSORS, read_safetensors(file), None  # says what is wrong
    if file.path.suffix in TORCH_SUFFIXES or head.startswith(PICKLE):
        legacy = LegacyFile(file)
        return TORCH, [legacy.load()], legacy
    raise UsageError(f"{file.path}: unknown kind of checkpoint", hint=f"known are {', '.join(SUFFIXES)}")


def _refuse_other_kinds(path: Path, head: bytes) -> None:
    """Raise InputError for what is often found in a checkpoint's place."""
    if head.startswith(LFS_POINTER):
        raise InputError(f"{path} is a Git LFS pointer, not the file itself", hint="git lfs pull")
    if head.lstrip().lower().startswith(PAGES):
        raise InputError(f"{path} is a web page, not a checkpoint", hint="download the file behind it")
    if head[TAR_MAGIC_AT : TAR_MAGIC_AT + len(TAR_MAGIC)] == TAR_MAGIC:
        raise InputError(
            f"{path} is a tar archive; PyTorch's format of that kind (before 0.1.10) is not read",
            hint="unpack it, or save it again with torch.save",
        )


def _join(path: Path, names: Mapping[str, Path], shards: Mapping[Path, CheckpointFile]) -> tuple[str, list[Any]]:
    """The tensors of an index, each from the file that the index names."""
    tensors: dict[Path, Mapping[str, Stored]] = {}
    kind = ""
    for place, file in shards.items():
        kind, (loaded, *_), torch_file = _load(file, file.bytes_at(0, HEAD))
        if not isinstance(loaded, Mapping):
            raise InputError(f"{place} holds no state dict", hint="copy or download it again")
        tensors[place] = {
            name: _placed(tensor, torch_file) for name, tensor in loaded.items() if isinstance(tensor, Stored | Strided)
        }
    missing = [name for name, place in names.items() if name not in tensors[place]]
    if missing:
        raise InputError(
            f"{path} names tensors that are not where it says ({len(missing)}):\n    "
            + "\n    ".join(shorten(missing)),
            hint="copy or download the index and its files again, of one version",
        )
    return kind, [{name: tensors[place][name] for name, place in names.items()}]


def _placed(tensor: Stored | Strided, torch_file: TorchFile | None) -> Stored:
    """Where a tensor of an index lies; that of a PyTorch file asks the file for its storage."""
    if isinstance(tensor, Stored):
        return tensor
    assert torch_file is not None
    return torch_file.stored(tensor)
