"""``python -m torch.distributed.run --standalone --nproc-per-node 4 bench/demo``; ``python bench/demo --help``."""

import signal
import sys
from pathlib import Path

# started by its folder's name, which puts the folder itself on the path instead of the one that holds the package
sys.path[0] = str(Path(__file__).parents[1])

from demo.train import main  # noqa: E402

if __name__ == "__main__":
    # torchrun passes Ctrl-C on: end at once, also in the middle of a collective
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(main())
