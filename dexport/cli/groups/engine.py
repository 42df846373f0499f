"""The TensorRT engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import click

from dexport.choices import AUTO, FLAVOURS, PLUGINS
from dexport.cli.headings import Option, expert_option, option
from dexport.cli.option_group import OptionGroup
from dexport.cli.parameters import choice, split_commas


@dataclass(frozen=True)
class Engine:
    """The TensorRT engine, if any, and the batches that the bundle is for."""

    trt: bool
    engine: str
    targets: tuple[str, ...]
    plugins: str
    profile: str


def _engine(targets: tuple[str, ...], **values: Any) -> Engine:
    return Engine(targets=split_commas(targets), **values)


class ProfileOption(Option):
    """Its help lists the built-in profiles, which are looked up when it is shown."""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        self.help = _profile_help()
        return super().get_help_record(ctx)


def _profile_help() -> str:
    from dexport.profiles import builtin_profiles

    return f"Batch range: {', '.join(builtin_profiles())}, or a TOML file."


ENGINE = OptionGroup(
    "engine",
    "Engine",
    _engine,
    (
        option("--trt/--no-trt", default=False, help="Build a TensorRT engine as well."),
        expert_option(
            "--engine",
            type=choice(AUTO, *FLAVOURS),
            default=AUTO,
            show_default=True,
            help="auto: tensorrt where there is a GPU and the package, else tensorrt-rtx.",
        ),
        option(
            "--target",
            "targets",
            multiple=True,
            metavar="SM[,SM]",
            help="GPU architectures, such as sm80,sm89,sm120. Repeatable.",
        ),
        expert_option(
            "--plugins",
            type=choice(*PLUGINS),
            default=PLUGINS[0],
            show_default=True,
            help="Plugin kernels in tensorrt engines (TensorRT-RTX has none); the ONNX file has function bodies either "
            "way.",
        ),
        option(
            "--profile",
            cls=ProfileOption,
            default="latency",
            show_default=True,
            metavar="NAME|FILE",
            help="Batch range: a name, or a TOML file.",
        ),
    ),
)
