"""``dexport build -c build.toml``: options of a build from a file.

Its tables are the option groups, its keys the options' long names, with ``-`` or ``_``::

    recipe = "dico-xl"

    [weights]
    checkpoint = ["DiCo-XL-3750K-256x256.pt", "decoder=vae.safetensors"]

    [precision]
    precision = "fp16"

    [engine]
    trt = true

The command line wins: an option that it gives replaces the file's, a repeatable one as a whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import click

from dexport.cli.option_group import OptionGroup
from dexport.cli.parameters import AtMost
from dexport.errors import UsageError
from dexport.limits import shown

if TYPE_CHECKING:
    import msgspec

RECIPE = "recipe"


def read_build_file(path: Path, groups: Sequence[OptionGroup]) -> dict[str, Any]:
    """Values of a command's parameters by their names, for ``Context.default_map``.

    Raises:
        UsageError: an unreadable file, bad TOML, an unknown key, or a value of another type.
    """
    import tomllib

    import msgspec

    try:
        document = tomllib.loads(path.read_text(encoding="utf-8-sig"))  # editors on Windows write a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"build file {path} cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"build file {path} is not valid TOML: {error}") from error
    spelled = _spelled(document, groups, path)
    try:
        given: Any = msgspec.convert(spelled, struct_of(groups))
    except msgspec.ValidationError as error:
        raise _wrong_value(str(error), groups, path) from error
    values = {} if given.recipe is msgspec.UNSET else {RECIPE: given.recipe}
    for group in groups:
        table = getattr(given, group.name)
        for option in _options(group):
            value = getattr(table, _field(option), msgspec.UNSET)
            if value is not msgspec.UNSET:
                values[str(option.name)] = [value] if option.multiple and isinstance(value, str) else value
    return values


def schema(groups: Sequence[OptionGroup]) -> dict[str, Any]:
    """The JSON schema of such files; keys are spelled with ``-``, and ``_`` is taken as well."""
    import msgspec

    return msgspec.json.schema(struct_of(groups))


def struct_of(groups: Sequence[OptionGroup]) -> type[msgspec.Struct]:
    """The type of a whole file: one struct per group, one field per option."""
    import msgspec

    unset: Any = msgspec.UNSET
    tables = []
    for group in groups:
        fields = [(_field(option), _type_of(option) | msgspec.UnsetType, unset) for option in _options(group)]
        table = msgspec.defstruct(
            group.title, fields, rename="kebab", forbid_unknown_fields=True, kw_only=True, frozen=True
        )
        tables.append((group.name, table | msgspec.UnsetType, unset))
    fields = [(RECIPE, str | msgspec.UnsetType, unset), *tables]
    return msgspec.defstruct("Build", fields, forbid_unknown_fields=True, kw_only=True, frozen=True)


def _options(group: OptionGroup) -> list[click.Option]:
    """Those that a file can have: flags that are short for another option are for the command line."""
    return [option for option in group.declared() if not option.hidden]


def _key(option: click.Option) -> str:
    return next(name for name in option.opts if name.startswith("--")).removeprefix("--")


def _field(option: click.Option) -> str:
    return _key(option).replace("-", "_")


def _type_of(option: click.Option) -> Any:
    import msgspec

    kind = option.type.kind if isinstance(option.type, AtMost) else option.type
    base: Any = str
    if option.is_flag:
        base = bool
    elif isinstance(kind, click.Choice):
        base = Literal[tuple(kind.choices)]
    elif isinstance(kind, type(click.INT)):
        base = int
    elif isinstance(kind, type(click.FLOAT)):
        base = float
    if isinstance(option.type, AtMost):
        base = Annotated[base, msgspec.Meta(ge=base(-option.type.most), le=base(option.type.most))]
    described = msgspec.Meta(description=option.help or "")
    return Annotated[base | list[base] if option.multiple else base, described]


def _spelled(document: Mapping[str, Any], groups: Sequence[OptionGroup], path: Path) -> dict[str, Any]:
    """The document with every key spelled with ``-``.

    Raises:
        UsageError: a key that is unknown, or there twice.
    """
    known = {group.name: [_key(option) for option in _options(group)] for group in groups}
    found: dict[str, Any] = {}
    for name, table in document.items():
        _refuse_unknown(name, [RECIPE, *known], path, "")
        if name == RECIPE or not isinstance(table, Mapping):
            found[name] = table
            continue
        keys: dict[str, Any] = {}
        for key, value in table.items():
            spelled = key.replace("_", "-")
            _refuse_unknown(spelled, known[name], path, f"[{name}] ")
            if spelled in keys:
                raise UsageError(f"build file {path}: [{name}] {spelled} is there twice", hint="give it once")
            keys[spelled] = value
        found[name] = keys
    return found


def _refuse_unknown(key: str, known: Iterable[str], path: Path, where: str) -> None:
    known = tuple(known)
    if key in known:
        return
    import difflib

    near = difflib.get_close_matches(key, known, n=2)
    guess = f"; did you mean {' or '.join(near)}?" if near else ""
    raise UsageError(
        f"build file {path}: unknown key {where}{shown(key)[1:-1]}{guess}", hint=f"known here: {', '.join(known)}"
    )


def _wrong_value(message: str, groups: Sequence[OptionGroup], path: Path) -> UsageError:
    """The error for ``Expected `bool`, got `str` - at `$.engine.trt```."""
    what, _, where = message.replace("`object`", "a table").partition(" - at `$")
    table, _, key = where.strip("`.").partition(".")
    options = {_key(option): option for group in groups if group.name == table for option in _options(group)}
    option = options.get(key.partition("[")[0])
    hint = "`dexport build --help-all` says what each option takes"
    if option is not None and isinstance(option.type, click.Choice):
        hint = f"choose from {', '.join(option.type.choices)}"
    named = f"[{table}] {key}" if key else table
    return UsageError(f"build file {path}: {named}: {what[:1].lower()}{what[1:]}", hint=hint)
