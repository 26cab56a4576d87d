# PYTHON_ARGCOMPLETE_OK
"""The whole job on embedded models and drawn scenes, in minutes on two CPU cores, with no download.

    python tools/demo.py

The last line it prints is one JSON object with the accuracies on held-out scenes.
Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
"""

import sys

from theworld.console import status_of
from theworld.demo import main

if __name__ == "__main__":
    sys.exit(status_of("demo", main))
