"""What two tokenizers let be compared, for many teachers' vocabularies and one student: a row of a table for each.

    python benchmarks/vocabularies.py FOLDER ... --student_model DIR --train_file FILE ...

Each folder holds a tokenizer and a config.json with the model's vocab_size, as a model's own does; no weights are read.
"kept" says whether the probe and fuzz texts come back byte for byte, and otherwise how the first of them is changed. A
refusal is printed as a run prints it.
"""

from __future__ import annotations

import argparse
import sys
import types
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from sar_kd.data.dataset import build_dataset  # noqa: E402
from sar_kd.data.files.samples import Document  # noqa: E402
from sar_kd.errors import UsageError  # noqa: E402
from sar_kd.evaluation.tokenizer_coverage import lacking_bytes, measure_coverage  # noqa: E402
from sar_kd.models.loading import load_tokenizers  # noqa: E402

HEAD = "vocabulary", "kind", "tokens", "bytes missing", "kept", "skipped", "strict"


def row_of(folder: str, student: str, documents: list[Document], block_size: int) -> list[str]:
    """The cells of a folder's row, as `HEAD`."""
    names = types.SimpleNamespace(teacher_model=folder, student_model=student, trust_remote_code=False)
    row = [Path(folder).name, *["-"] * (len(HEAD) - 1)]
    try:
        pair = load_tokenizers(names)
        backend, table = getattr(pair.teacher, "backend_tokenizer", None), pair.token_tables[1]
        model = type(pair.teacher if backend is None else backend.model).__name__
        row[1:3] = f"{model}, {'SentencePiece' if table.metaspace else 'bytes'}", f"{len(pair.teacher):,}"
        lacking = lacking_bytes(table)
        row[3:5] = f"{len(lacking)}: {bytes(lacking).hex(' ')}" if lacking else "none", table.change or "yes"
        found = measure_coverage(build_dataset(documents, pair, block_size, 8 * block_size))
    except UsageError as error:
        row[5] = f"refused: {error}"
        return row
    row[5:] = f"{found.skipped_share:.2%}", f"{found.strict:.1%}"
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--student_model", required=True)
    parser.add_argument("--train_file", nargs="+", required=True)
    parser.add_argument("--block_size", type=int, default=512)
    options = parser.parse_args()
    documents = [Document(file, Path(file).read_text(encoding="utf-8")) for file in options.train_file]
    print(" | ".join(HEAD))
    for folder in options.folders:
        print(" | ".join(row_of(folder, options.student_model, documents, options.block_size)), flush=True)


if __name__ == "__main__":
    main()
