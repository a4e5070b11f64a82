"""What every launcher runs: `python train.py`, `accelerate launch train.py`, `torchrun … train.py`.

`python train.py --help` lists the options; `mnist-dist train` is the same thing installed as a command.
"""

import sys

from mnist_dist.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
