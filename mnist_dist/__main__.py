"""`python -m mnist_dist`: the command line, also if the `mnist-dist` script is not installed."""

import signal
import sys

# until there is a handler that says so, SIGINT ends the process in silence: not with a traceback out of an import
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from mnist_dist.cli import main

if __name__ == "__main__":
    sys.exit(main())
