"""python -m dnipipe"""

import sys

from dnipipe.cli import main

if __name__ == "__main__":
    sys.exit(main())
