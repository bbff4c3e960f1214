"""``python -m pyroflows``, which ``torchrun -m pyroflows`` starts in many processes."""

import sys

from pyroflows.cli import main

if __name__ == "__main__":
    sys.exit(main())
