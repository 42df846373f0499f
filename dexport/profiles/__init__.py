"""Build profiles: the batch range an engine is built for and the GPUs it is built for.

A profile is a TOML file. The built-in ones lie beside this module; a path to any other file works as well::

    name = "mine"                   # optional: the file's stem
    description = "what it is for"  # optional

    [batch]
    min = 1
    opt = 2
    max = 4

    [engine]                        # optional
    targets = ["sm89", "sm120"]     # compute capabilities where no GPU and no --target decides
    workspace_mib = 2048            # limit of the builder's scratch memory
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dexport.errors import UsageError
from dexport.limits import MOST_BATCH, MOST_WORKSPACE_MIB, shown

_FOLDER = Path(__file__).parent
_TOP_KEYS = ("name", "description", "batch", "engine")
_BATCH_KEYS = ("min", "opt", "max")
_ENGINE_KEYS = ("targets", "workspace_mib")


@dataclass(frozen=True)
class Profile:
    """What an engine is built for.

    Attributes:
        batch_min: smallest batch the engine accepts.
        batch_opt: batch it is tuned for.
        batch_max: largest batch it accepts.
        targets: compute capabilities such as ``sm89``, used where neither a GPU nor ``--target`` decides.
        workspace_mib: limit of the builder's scratch memory in MiB; None leaves it to TensorRT.
    """

    name: str
    description: str
    batch_min: int
    batch_opt: int
    batch_max: int
    targets: tuple[str, ...]
    workspace_mib: int | None


def builtin_profiles() -> tuple[str, ...]:
    """Names of the profiles that come with dexport, sorted."""
    return tuple(sorted(file.stem for file in _FOLDER.glob("*.toml")))


def load_profile(name_or_path: str | Path) -> Profile:
    """Load a built-in profile by name, or any profile by path.

    Errors:
        UsageError: unknown name, unreadable file, bad TOML, unknown key, wrong type or disordered batches.
    """
    path = _locate(name_or_path)
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8-sig"))  # editors on Windows write a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"profile {path} cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"profile {path} is not valid TOML: {error}") from error
    return _parse(document, path)


def _locate(name_or_path: str | Path) -> Path:
    name = str(name_or_path)
    if name in builtin_profiles():
        return _FOLDER / f"{name}.toml"
    path = Path(name_or_path)
    looks_like_path = path.suffix == ".toml" or len(path.parts) > 1
    if path.is_file():
        return path
    if looks_like_path:
        raise UsageError(f"profile {path} does not exist", hint=_builtin_hint())
    raise UsageError(f"there is no profile {name!r}{_near(name, builtin_profiles())}", hint=_builtin_hint())


def _parse(document: Mapping[str, Any], path: Path) -> Profile:
    _known_keys(document, _TOP_KEYS, path, "")
    batch = _table(document, "batch", _BATCH_KEYS, path)
    engine = _table(document, "engine", _ENGINE_KEYS, path)
    missing = [key for key in _BATCH_KEYS if key not in batch]
    if missing:
        raise UsageError(f"profile {path}: [batch] lacks {', '.join(missing)}", hint="give min, opt and max")
    low, best, high = (_positive(batch[key], f"[batch] {key}", path, MOST_BATCH) for key in _BATCH_KEYS)
    if not low <= best <= high:
        raise UsageError(
            f"profile {path}: [batch] min {low}, opt {best}, max {high} are out of order",
            hint="min <= opt <= max must hold",
        )
    workspace = engine.get("workspace_mib")
    return Profile(
        name=_text(document.get("name", path.stem), "name", path),
        description=_text(document.get("description", ""), "description", path),
        batch_min=low,
        batch_opt=best,
        batch_max=high,
        targets=_targets(engine.get("targets", []), path),
        workspace_mib=None
        if workspace is None
        else _positive(workspace, "[engine] workspace_mib", path, MOST_WORKSPACE_MIB),
    )


def _table(document: Mapping[str, Any], key: str, known: Iterable[str], path: Path) -> Mapping[str, Any]:
    table = document.get(key, {})
    if not isinstance(table, Mapping):
        raise UsageError(f"profile {path}: {key} must be a table, not {table!r}", hint=f"write it as [{key}]")
    _known_keys(table, known, path, f"[{key}] ")
    return table


def _known_keys(table: Mapping[str, Any], known: Iterable[str], path: Path, where: str) -> None:
    known = tuple(known)
    for key in table:
        if key not in known:
            raise UsageError(
                f"profile {path}: unknown key {where}{key}{_near(key, known)}",
                hint=f"known here: {', '.join(known)}",
            )


def _positive(value: object, where: str, path: Path, most: int) -> int:
    # bool is an int in Python, and `min = true` is a mistake.
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UsageError(f"profile {path}: {where} must be a whole number of at least 1, not {shown(value)}")
    if value > most:
        raise UsageError(f"profile {path}: {where} is {shown(value)}", hint=f"{most:,} is the most")
    return value


def _text(value: object, where: str, path: Path) -> str:
    if not isinstance(value, str):
        raise UsageError(f"profile {path}: {where} must be a string, not {value!r}")
    return value


def _targets(value: object, path: Path) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise UsageError(f"profile {path}: [engine] targets must be a list of strings, not {value!r}")
    for target in value:
        if not isinstance(target, str) or not re.fullmatch(r"sm\d{2,3}", target):
            raise UsageError(
                f"profile {path}: [engine] target {target!r} is not a compute capability",
                hint="write e.g. sm89",
            )
    return tuple(value)


def _near(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=2)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def _builtin_hint() -> str:
    return f"built in: {', '.join(builtin_profiles())}; or give the path of a TOML file"
