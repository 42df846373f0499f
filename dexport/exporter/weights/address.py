"""Where a checkpoint is: a file, a folder with one, or an address on the Hub."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

from dexport.errors import InputError, MachineError, UsageError

TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
SUFFIXES = (".safetensors", *TORCH_SUFFIXES)
INDEX_SUFFIXES = tuple(f"{suffix}.index.json" for suffix in SUFFIXES)
FILE_SUFFIXES = (*SUFFIXES, ".json", ".onnx", ".npz", ".npy", ".pkl", ".h5", ".msgpack", ".gguf", ".tar", ".gz", ".zip")
"""Endings that no name on the Hub has."""
SHARD = re.compile(r"-\d{5}-of-\d{5}\.\w+$")
HUB_ADDRESS = re.compile(r"hf://([^/]+/[^/@]+)(?:@(refs/(?:pr|convert)/[^/]+|[^/]+))?(?:/(.+))?")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
CONTAINER = "::"
SERVER_ERROR = 500
LISTED = 20


def split_container(checkpoint: str) -> tuple[str, str]:
    """``FILE::KEY`` -> the file, and which of its state dicts; the key is empty where none is named."""
    if CONTAINER not in checkpoint or is_path(checkpoint):
        return checkpoint, ""
    file, _, key = checkpoint.rpartition(CONTAINER)
    return file, key


def is_path(text: str) -> bool:
    """Whether something is there under this name."""
    try:
        return Path(text).exists()
    except (OSError, ValueError):
        return False


def locate(checkpoint: str) -> Path:
    """The local path of a checkpoint, downloaded from the Hub when it is an address there.

    What looks like a file is a file: only ``hf://`` and a plain ``owner/name`` without such a folder are the Hub's.

    Raises:
        UsageError: no such file, or several.
        InputError: the Hub does not have it.
        MachineError: the Hub cannot be reached.
    """
    checkpoint, _ = split_container(checkpoint)
    if not checkpoint.strip():
        raise UsageError("the address of the checkpoint is empty", hint="give a file, or hf://owner/name/file")
    address = HUB_ADDRESS.fullmatch(checkpoint)
    if address:
        repo, revision, file = address.groups()
        return _download(repo, revision and unquote(revision), file)
    try:
        path = Path(checkpoint).expanduser() if checkpoint.startswith("~") else Path(checkpoint)
        if path.is_file():
            return path
        if path.is_dir():
            return path / _only(_candidates(sorted(p.name for p in path.iterdir())), f"folder {path}")
        there = path.exists()
    except (OSError, ValueError, RuntimeError) as error:
        raise UsageError(f"checkpoint {checkpoint!r} cannot be opened: {error}", hint="check the path") from error
    if there:
        raise UsageError(f"checkpoint {checkpoint} is no regular file", hint="give a file")
    if HUB_NAME.fullmatch(checkpoint) and path.suffix not in FILE_SUFFIXES and not path.parent.exists():
        return _download(checkpoint, None, None)
    raise UsageError(f"checkpoint {checkpoint} does not exist", hint="give a file, or hf://owner/name/file for the Hub")


def shards_of(index: Path, names: list[str]) -> list[Path]:
    """The files beside an index, downloaded where the index was.

    Raises:
        InputError: one is not there.
    """
    missing = [name for name in names if not (index.parent / name).is_file()]
    origin = _hub_origin(index) if missing else None
    for name in missing if origin else ():
        repo, commit, folder = origin  # type: ignore[misc]
        _download(repo, commit, f"{folder}{name}")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise InputError(
            f"{index} names {len(missing)} files that are not beside it: {', '.join(shorten(missing))}",
            hint="copy or download them to its folder",
        )
    return [index.parent / name for name in names]


def shorten(names: list[str]) -> list[str]:
    """At most ``LISTED`` names, and how many more there are."""
    rest = len(names) - LISTED
    return [*names[:LISTED], f"... and {rest} more"] if rest > 0 else names


def _hub_origin(path: Path) -> tuple[str, str, str] | None:
    """Repository, commit and folder of a file in the Hub's cache."""
    found = re.search(r"/models--([^/]+)--([^/]+)/snapshots/(\w+)/((?:.+/)?)[^/]+$", path.absolute().as_posix())
    return (f"{found[1]}/{found[2]}", found[3], found[4]) if found else None


def _candidates(names: list[str]) -> list[str]:
    """Files of weights; an index stands for those that it joins."""
    indexes = {name.rpartition("/")[0] for name in names if name.endswith(INDEX_SUFFIXES)}
    weights = [name for name in names if name.endswith((*SUFFIXES, *INDEX_SUFFIXES))]
    return [name for name in weights if not (SHARD.search(name) and name.rpartition("/")[0] in indexes)]


def _download(repo: str, revision: str | None, file: str | None) -> Path:
    from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError

    try:
        if file is None and constants.HF_HUB_OFFLINE:
            folder = Path(snapshot_download(repo, revision=revision, local_files_only=True))
            cached = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
            return folder / _only(_candidates(sorted(cached)), f"hf://{repo} (in the cache)")
        if file is None:
            file = _only(_candidates(list(HfApi().list_repo_files(repo, revision=revision))), f"hf://{repo}")
        return Path(hf_hub_download(repo, file, revision=revision))
    except HFValidationError as error:
        raise UsageError(f"hf://{repo}: {error}", hint="an address is hf://owner/name/file") from error
    except (HTTPError, OSError) as error:
        if isinstance(error, HfHubHTTPError) and error.response.status_code < SERVER_ERROR:
            raise InputError(f"hf://{repo}: {error}", hint="check the name, the revision and your access") from error
        raise MachineError(
            f"hf://{repo} cannot be reached: {error}", hint="download the file elsewhere and give its path"
        ) from error


def _only(names: list[str], where: str) -> str:
    if len(names) != 1:
        listed = "\n    ".join(shorten(names)) or "none"
        raise UsageError(f"{where} holds {len(names)} checkpoint files:\n    {listed}", hint="name one file")
    return names[0]
