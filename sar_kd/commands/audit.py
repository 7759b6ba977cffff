"""`python -m sar_kd audit`: what two tokenizers have in common on a text, before anything is trained."""

from __future__ import annotations

import dataclasses
import json

from sar_kd.config.command_line import parse_verb
from sar_kd.data.dataset import Dataset
from sar_kd.data.sources import load_documents
from sar_kd.data.token_cache import TokenCache
from sar_kd.evaluation.tokenizer_coverage import measure_coverage, name_left_out
from sar_kd.models.loading import load_tokenizers
from sar_kd.runtime.console import wrap_lines
from sar_kd.runtime.files import plain


def main(argv: list[str]) -> dict:
    """Print the coverage of `--teacher_model` and `--student_model` on the training text; `--json` for programs.

    Raises: UsageError for what the user can mend
    """
    config, as_json = parse_verb("audit", __doc__.partition(": ")[2], ("models", "data"), argv)
    pair = load_tokenizers(config.models)
    texts, _ = load_documents(config.data)
    cache = TokenCache(config.data.token_cache)
    corpus = Dataset(texts, pair, config.data.block_size, 8 * config.data.block_size, cache)
    coverage = measure_coverage(corpus)
    record = {**dataclasses.asdict(coverage), "mix": coverage.mix}
    print(
        json.dumps(plain(record), indent=2)
        if as_json
        else wrap_lines(*coverage.lines(), *name_left_out(coverage.left_out))
    )
    return {"status": "finished"}
