"""``dexport doctor``."""

from __future__ import annotations

from dexport.cli.app import print_json
from dexport.cli.headings import command
from dexport.cli.parameters import as_json


@command("doctor")
@as_json
def doctor_command(as_json: bool) -> None:
    """Say what this machine can build and run, with versions."""
    from dexport.cli.commands.doctor_printer import print_machine
    from dexport.exporter.machine import describe_machine

    described = describe_machine()
    print_json(described) if as_json else print_machine(described)
