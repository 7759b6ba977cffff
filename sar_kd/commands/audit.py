"""`python -m sar_kd audit`: how much of a text two tokenizers let be compared."""

from __future__ import annotations

import dataclasses
import json

from sar_kd.config.commands import AuditConfig
from sar_kd.data.dataset import build_dataset
from sar_kd.data.files.sources import load_documents
from sar_kd.data.skipped import skipped_lines
from sar_kd.data.token_cache import TokenCache
from sar_kd.evaluation.tokenizer_coverage import measure_coverage
from sar_kd.models.loading import load_tokenizers
from sar_kd.runtime.console import print_stderr
from sar_kd.runtime.files import json_safe


def main(config: AuditConfig) -> dict:
    """Print the coverage of `--teacher_model` and `--student_model` on the training text; `--json` for programs.

    Raises: UsageError for what the user can mend
    """
    pair = load_tokenizers(config.models)
    texts, _ = load_documents(config.data, print_stderr)
    cache = TokenCache(config.data.token_cache)
    dataset = build_dataset(texts, pair, config.data.block_size, 8 * config.data.block_size, cache)
    coverage = measure_coverage(dataset)
    if config.output.json:
        record = {**dataclasses.asdict(coverage), "auto_alignment": coverage.auto_alignment}
        print(json.dumps(json_safe(record), indent=2))
    else:
        print("\n".join([*coverage.lines(), *skipped_lines(dataset.text)]))
    return {"status": "finished"}
