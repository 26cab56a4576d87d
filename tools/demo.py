"""The whole job on embedded models and drawn scenes, in minutes on two CPU cores, with no download.

    python tools/demo.py

The last line it prints is one JSON object with the accuracies on held-out scenes.
"""

import argparse
import json
import sys
from pathlib import Path


def main() -> int:
    """Parses arguments, runs the demo, prints the result line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--config", type=Path, default=Path("configs/demo.json"), help="default: configs/demo.json"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("checkpoints/demo"), help="default: checkpoints/demo"
    )
    parser.add_argument("--seed", type=int, default=0, help="of scenes, weights and order (default: 0)")
    arguments = parser.parse_args()
    # After the arguments: torch takes seconds to load, and --help should not.
    from theworld.console import quiet_libraries
    from theworld.demo import run_demo

    quiet_libraries()
    try:
        result = run_demo(arguments.config, arguments.output, arguments.seed)
    except (ValueError, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
