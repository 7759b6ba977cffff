"""`python -m sar_kd`: see `sar_kd.commands.main`."""

import sys

from sar_kd.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
