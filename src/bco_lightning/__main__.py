"""``python -m bco_lightning``."""

import sys

from bco_lightning.cli import main

if __name__ == "__main__":
    sys.exit(main())
