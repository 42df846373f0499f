"""``python -m dexport``."""

from dexport.cli import main

main(prog_name="dexport")
