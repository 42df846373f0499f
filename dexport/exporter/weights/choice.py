"""Which of a file's state dicts a network takes: the averaged one, if it is there; never another without a word."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TypeVar

from dexport.errors import InputError, UsageError
from dexport.exporter.weights.containers import Form, Unread, without_dots

T = TypeVar("T")
LISTED = 20


class MisfitError(Exception):
    """A form does not fit the network: how many names differ, and what to tell the user."""

    def __init__(self, count: int, error: InputError) -> None:
        super().__init__(str(error))
        self.count = count
        self.error = error


def choose(
    path: str,
    forms: Sequence[Form],
    unread: Sequence[Unread],
    fit: Callable[[Form], T],
    expected: Collection[str],
    wanted: str = "",
) -> T:
    """What ``fit`` makes of the form that is meant.

    Args:
        path: of the file, for messages.
        fit: raises :class:`MisfitError` where a form does not fit.
        expected: names in the network.
        wanted: the address of a form; empty to decide by what they are.

    Raises:
        InputError: none fits, several that differ do, or an average is there and cannot be taken.
        UsageError: there is no form of that address.
    """
    if wanted:
        named = [form for form in forms if form.address == wanted]
        if not named:
            known = ", ".join(dict.fromkeys(form.address for form in forms[:LISTED])) or "none"
            raise UsageError(f"{path} holds no weights {wanted!r}", hint=f"choose from: {known}")
        forms, unread = named, ()
    else:
        forms = [form for form in forms if form.known]
    fitting: list[tuple[Form, T]] = []
    misfits: list[MisfitError] = []
    for form in forms:
        if any(form.base == other.base for other, _ in fitting):
            continue
        try:
            fitting.append((form, fit(form)))
        except MisfitError as misfit:
            misfits.append(misfit)
    averaged = [(form, value) for form, value in fitting if form.averaged]
    candidates = averaged or fitting
    if not candidates:
        raise min(misfits, key=lambda misfit: misfit.count).error
    taken, value = candidates[0]
    rivals = [form for form, _ in candidates[1:] if form.tensors != taken.tensors]
    if rivals:
        addresses = [form.address for form in (taken, *rivals)]
        raise InputError(
            f"{path} holds several weights that fit: {', '.join(addresses)}",
            hint=f"name the one that is meant: {path}::{addresses[0]}",
        )
    if not taken.averaged and not wanted:
        _refuse_ignored(path, forms, unread, taken, expected)
    return value


def _refuse_ignored(
    path: str, forms: Sequence[Form], unread: Sequence[Unread], taken: Form, expected: Collection[str]
) -> None:
    """Raise InputError where the file has an average of these weights that would be left out."""
    ignored = {one.label: one.reason for one in unread}
    for form in forms:
        if form.averaged and form.base not in ignored and (not form.inside or _is_average_of(form, expected)):
            ignored[form.base] = "its names and shapes do not fit this model"
    if ignored:
        label, reason = next(iter(ignored.items()))
        raise InputError(
            f"{path} holds averaged weights ({label}) that cannot be taken: {reason}",
            hint=f"to export the weights that are not averaged, name them: {path}::{taken.address}",
        )


def _is_average_of(average: Form, expected: Collection[str]) -> bool:
    """Whether any of its names is one of the network's, whatever stands before either, with dots or without."""
    own, theirs = ({without_dots(name) for name in names} for names in (average.tensors, expected))
    return not own.isdisjoint(_endings(expected)) or not theirs.isdisjoint(_endings(average.tensors))


def _endings(names: Collection[str]) -> set[str]:
    parts = (name.split(".") for name in names)
    return {"".join(part[start:]) for part in parts for start in range(len(part))}
