"""The command line: parse, call, print."""

from __future__ import annotations

from dexport.cli.app import main
from dexport.cli.commands.bench import bench_command
from dexport.cli.commands.build import build_command
from dexport.cli.commands.cache import cache_group
from dexport.cli.commands.compare import compare_command
from dexport.cli.commands.diff import diff_command
from dexport.cli.commands.doctor import doctor_command
from dexport.cli.commands.fid import fid_command
from dexport.cli.commands.info import info_command
from dexport.cli.commands.pack import pack_command, unpack_command
from dexport.cli.commands.plugins import plugins_group
from dexport.cli.commands.quantize import quantize_command
from dexport.cli.commands.recipes import recipes_command
from dexport.cli.commands.report import baseline_group, report_command
from dexport.cli.commands.sample import sample_command
from dexport.cli.commands.sweep import sweep_command
from dexport.cli.commands.validate import validate_command

main.add_section("Make", build_command, quantize_command)
main.add_section("Run", sample_command)
main.add_section(
    "Prove",
    validate_command,
    compare_command,
    diff_command,
    bench_command,
    sweep_command,
    fid_command,
    report_command,
    baseline_group,
)
main.add_section("Ship", pack_command, unpack_command)
main.add_section("Look", recipes_command, info_command, doctor_command, cache_group, plugins_group)

__all__ = ["main"]
