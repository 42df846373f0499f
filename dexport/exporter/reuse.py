"""The steps of one build as entries of the cache: taken from there where nothing that they depend on has changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from dexport.exporter.cache import Cache, key_of
from dexport.exporter.custom_ops import CustomOp
from dexport.exporter.engine.process import EngineReport, TensorInfo
from dexport.exporter.export import Exported
from dexport.exporter.options import BuildOptions
from dexport.exporter.recipes import BUILT_IN
from dexport.exporter.steps import StepLog
from dexport.exporter.variant import Variant
from dexport.exporter.weights.source import Origin

T = TypeVar("T")


class Reuse:
    """Steps of one build.

    Args:
        cache: None to run everything.
        facts: JSON values that decide what the ONNX file is, on which all other steps depend.
        check: raises if what was read is no longer what the facts say; then nothing is kept.
    """

    def __init__(
        self,
        cache: Cache | None,
        label: str,
        folder: Path,
        facts: Mapping[str, Any],
        log: StepLog,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.cache = cache
        self.label = label
        self.folder = folder
        self.facts = facts
        self.log = log
        self.check = check

    def step(
        self,
        name: str,
        run: Callable[[], T],
        *,
        pack: Callable[[T], Any],
        unpack: Callable[[Any], T],
        files: Callable[[T], Sequence[str]],
        facts: Mapping[str, Any] | None = None,
        worth_keeping: Callable[[T], bool] = lambda _: True,
    ) -> T:
        """What ``run`` returns, from the cache where it is there.

        Args:
            pack, unpack: the result as JSON values, and back.
            files: what ``run`` has written, relative to the folder.
            facts: what the step depends on besides the facts of the build.
        """
        if self.cache is None:
            return run()
        key = key_of({**self.facts, "step": name, **(facts or {})})
        report = self.log.reuse(name, lambda: self.cache and self.cache.take(key, self.folder))
        if report is not None:
            return unpack(report["result"])
        result = run()
        self.check()
        if worth_keeping(result):
            with self.log.step("keep"):
                report = {"result": pack(result)}
                self.cache.keep(key, f"{self.label}: {name}", self.folder, list(files(result)), report)
        return result


def facts_of(variant: Variant, origin: Origin, options: BuildOptions, **others: Any) -> dict[str, Any]:
    """What decides what the ONNX files are."""
    return {
        "recipe": variant.recipe.name,
        "config": variant.config_json(),
        "latent": variant.latent,
        "graphs": variant.graphs,
        "weights": {name: value for name, value in asdict(origin).items() if name != "path"},
        "options": options.decisive,
        **others,
    }


def is_built_in(variant: Variant) -> bool:
    """A recipe of the user's own may change in places that nobody sees."""
    return any(variant.recipe is recipe for recipe in BUILT_IN)


def exported_from_json(values: Mapping[str, Any]) -> Exported:
    ops = tuple(CustomOp(**{**op, "ptx_sha256": tuple(op["ptx_sha256"])}) for op in values["custom_ops"])
    return Exported(**{**values, "custom_ops": ops})


def engine_report_from_json(values: Mapping[str, Any]) -> EngineReport:
    def tensors(entries: Sequence[Mapping[str, Any]]) -> tuple[TensorInfo, ...]:
        return tuple(TensorInfo(entry["name"], entry["dtype"], tuple(entry["shape"])) for entry in entries)

    return EngineReport(
        **{
            **values,
            "targets": tuple(values["targets"]),
            "inputs": tensors(values["inputs"]),
            "outputs": tensors(values["outputs"]),
        }
    )
