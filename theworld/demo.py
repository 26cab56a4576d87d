# PYTHON_ARGCOMPLETE_OK
"""`python -m theworld.demo`: see `theworld.cli.demo`."""

import sys

from theworld.utils.console import run_tool

if __name__ == "__main__":
    from theworld.cli.demo import main

    sys.exit(run_tool("demo", main))
