"""How the network is traced."""

from __future__ import annotations

from dataclasses import dataclass

import click

from dexport.choices import GUIDANCE
from dexport.cli.headings import expert_option, option
from dexport.cli.option_group import OptionGroup
from dexport.cli.parameters import STEPS, choice


@dataclass(frozen=True)
class Graph:
    """How the network is traced."""

    guidance: str
    graphs: tuple[str, ...]
    fold_steps: int | None
    opset: int
    no_passes: tuple[str, ...]


GRAPH = OptionGroup(
    "graph",
    "Graph",
    Graph,
    (
        option(
            "--guidance",
            type=choice(*GUIDANCE),
            default=GUIDANCE[0],
            show_default=True,
            help="fused: the graph applies the system's own guidance.",
        ),
        option(
            "--fold-steps",
            type=STEPS,
            metavar="STEPS",
            help="Compute what depends on time alone now, for the times of so many sampling steps; the bundle takes "
            "no others.",
        ),
        expert_option(
            "--graph",
            "graphs",
            multiple=True,
            metavar="NAME",
            help="Export this graph of the recipe too, such as all: what every branch of DiMR predicts. Repeatable.",
        ),
        expert_option("--opset", type=click.INT, default=23, show_default=True, help="ONNX opset."),
        expert_option(
            "--no-pass",
            "no_passes",
            multiple=True,
            metavar="NAME",
            help="Leave out a graph pass, of docs/performance.md. Repeatable.",
        ),
    ),
)
