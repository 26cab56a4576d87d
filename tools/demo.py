# PYTHON_ARGCOMPLETE_OK
"""Run all three phases on embedded models and drawn scenes, in minutes on two CPU cores, without a download.

    python tools/demo.py

The same as `python -m theworld.demo`; see --help.
"""

import sys

from theworld.utils.starting import starting

with starting():
    from theworld.utils.console import run_tool


def main() -> int:
    """Run the demo; return the exit status."""
    with starting():
        from theworld.cli.demo import main

    return main()


if __name__ == "__main__":
    sys.exit(run_tool("demo", main))
