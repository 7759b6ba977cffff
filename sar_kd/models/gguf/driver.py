"""Run llama.cpp's `convert_hf_to_gguf.py`, in a process of its own, so that it also takes a byte-level vocabulary that
it does not know: python driver.py CONVERTER PRE_TOKENIZER OPTIONS...

PRE_TOKENIZER is the name that such a vocabulary gets, or '' if it is to be refused as the converter does.
"""

from __future__ import annotations

import importlib
import runpy
import sys
from pathlib import Path
from typing import Any


def main(converter: str, name: str, *options: str) -> None:
    """Run the converter, which ends the process with 1 where it fails."""
    sys.path.insert(0, str(Path(converter).parent))
    base: Any = importlib.import_module("conversion.base")
    find = base.TextModel.get_vocab_base_pre

    def find_or_take(self: Any, tokenizer: Any) -> str:
        try:
            return find(self, tokenizer)
        except NotImplementedError:
            if not name:
                raise
            return name

    base.TextModel.get_vocab_base_pre = find_or_take
    sys.argv = [converter, *options]
    runpy.run_path(converter, run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
