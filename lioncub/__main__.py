"""``python -m lioncub``."""

import sys

from lioncub.cli import main

if __name__ == "__main__":
    sys.exit(main())
