"""``python bench/gpu_report --help``."""

import sys
from pathlib import Path

# started by its folder's name, which puts the folder itself on the path instead of the one that holds the package
sys.path[0] = str(Path(__file__).parents[1])

from gpu_report.cli import main  # noqa: E402

# processes that compile import this file too
if __name__ == "__main__":
    sys.exit(main())
