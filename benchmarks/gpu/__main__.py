"""`python benchmarks/gpu`: see `command.py`."""

import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path[:] = [str(FOLDER.parent), str(FOLDER.parents[1]), *(path for path in sys.path if path != str(FOLDER))]

if __name__ == "__main__":
    from gpu.command import main

    sys.exit(main())
