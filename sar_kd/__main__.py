"""`sar-kd VERB`, and `python -m sar_kd VERB`: everything that the package does.

train       distil a teacher into a student (as train_sar_kd_stable.py does)
preflight   what a run with the same flags would find here; trains nothing
cache       keep what a teacher says of a text, for runs without it
report      report.html of a run, or of several beside one another
generate    teacher, student before and student after on one prompt
sft         fine-tune a model on questions with answers
explain     what a log of losses and gradient norms says went wrong
forensics   why a step of a run was not finite, and what to try
audit       what two tokenizers have in common on a text
routers     the routers of a mixture-of-experts model
embedded    train the embedded pair anew

sar-kd VERB --help shows a verb's flags.
"""

from __future__ import annotations

import difflib
import importlib
import sys

from sar_kd.cli import run
from sar_kd.version import __version__

VERBS = {
    "train": "sar_kd.train",
    "preflight": "sar_kd.preflight",
    "cache": "sar_kd.cache",
    "report": "sar_kd.report",
    "generate": "sar_kd.generate",
    "sft": "sar_kd.supervised",
    "explain": "sar_kd.explain",
    "forensics": "sar_kd.forensics",
    "audit": "sar_kd.audit",
    "routers": "sar_kd.router_table",
    "embedded": "sar_kd.embedded.build",
}


def main(argv: list[str] | None = None) -> int:
    """Run the verb that `argv` begins with; 2 where there is none of that name. Exit codes as `cli.run`."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--version"]:
        print(f"sar-kd {__version__}")
        return 0
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__.strip())
        return 0
    if argv[0] not in VERBS:
        nearest = difflib.get_close_matches(argv[0], VERBS, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(VERBS)}"
        print(f"error: {argv[0]}: no such verb; {hint}", file=sys.stderr)
        return 2
    verb = importlib.import_module(VERBS[argv[0]])
    return run(verb.main, argv[1:], resumable=argv[0] == "train")


if __name__ == "__main__":
    sys.exit(main())
