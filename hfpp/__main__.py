"""Lets `python -m hfpp` and `torchrun -m hfpp` run the command line."""

import sys

from hfpp.cli import main

if __name__ == "__main__":
    sys.exit(main())
