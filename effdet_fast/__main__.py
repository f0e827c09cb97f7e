"""``python -m effdet_fast``: the same commands as ``effdet-fast``."""

import sys

from effdet_fast.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
