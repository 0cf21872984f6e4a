"""python -m hqdm_cli"""

import sys

from hqdm_cli.app import main

if __name__ == "__main__":
    sys.exit(main())
