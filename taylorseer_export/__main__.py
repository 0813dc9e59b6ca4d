"""`python -m taylorseer_export`: the command line."""

import sys

from taylorseer_export.cli import main

if __name__ == "__main__":
    sys.exit(main())
