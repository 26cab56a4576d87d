# PYTHON_ARGCOMPLETE_OK
"""`python -m theworld.demo`: see `theworld.cli.demo`."""

import sys

from theworld.utils.starting import starting

if __name__ == "__main__":
    with starting():
        from theworld.cli.demo import main
        from theworld.utils.console import run_tool

    sys.exit(run_tool("demo", main))
