"""`python -m optax_constraints`, the same as the command `optax-constraints`."""

import sys

from optax_constraints._cli import main

if __name__ == "__main__":
    sys.exit(main())
