"""`python -m tools.pretrain`: see `pretrain.py`."""

import sys

from tools.pretrain.pretrain import main

if __name__ == "__main__":
    sys.exit(main())
