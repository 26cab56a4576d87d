"""The whole job on embedded models and drawn scenes, in minutes on two CPU cores, with no download.

    python tools/demo.py

The last line it prints is one JSON object with the accuracies on held-out scenes.
"""

import sys

from theworld.demo import main

if __name__ == "__main__":
    sys.exit(main())
