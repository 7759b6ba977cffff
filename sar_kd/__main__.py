"""`python -m sar_kd VERB`: everything that is not a training run.

embedded    train the embedded pair anew
"""

from __future__ import annotations

import importlib
import sys

VERBS = {"embedded": "sar_kd.embedded.build"}


def main(argv: list[str]) -> int:
    """Run the verb that `argv` begins with; 2 where there is none of that name."""
    if not argv or argv[0] not in VERBS:
        print(__doc__.strip(), file=sys.stderr if argv else sys.stdout)
        return 2 if argv else 0
    importlib.import_module(VERBS[argv[0]]).main(argv[1:])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
