"""`python -m sar_kd VERB`: everything but distillation itself.

audit       what two tokenizers have in common on a text
embedded    train the embedded pair anew
explain     what a log of losses and gradient norms says went wrong
forensics   why a step of a run was not finite, and what to try
routers     the routers of a mixture-of-experts model
sft         fine-tune a model on questions with answers
"""

from __future__ import annotations

import importlib
import sys

from sar_kd.cli import run

VERBS = {
    "audit": "sar_kd.audit",
    "embedded": "sar_kd.embedded.build",
    "explain": "sar_kd.explain",
    "forensics": "sar_kd.forensics",
    "routers": "sar_kd.router_table",
    "sft": "sar_kd.supervised",
}


def main(argv: list[str]) -> int:
    """Run the verb that `argv` begins with; 2 where there is none of that name. Exit codes as `cli.run`."""
    if not argv or argv[0] not in VERBS:
        print(__doc__.strip(), file=sys.stderr if argv else sys.stdout)
        return 2 if argv else 0
    verb = importlib.import_module(VERBS[argv[0]])
    return run(verb.main, argv[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
