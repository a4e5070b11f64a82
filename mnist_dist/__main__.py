"""`python -m mnist_dist`: the command line, also if the `mnist-dist` script is not installed."""

import sys

from mnist_dist.cli import main

if __name__ == "__main__":
    sys.exit(main())
