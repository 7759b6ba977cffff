"""Parts of the suite's runs, and the row of the table that a scenario adds."""

import pytest
import torch

from sar_kd.config.lora import LoraConfig
from sar_kd.config.sections import GuardConfig, LossConfig
from sar_kd.data.dataset import build_dataset
from sar_kd.data.files.samples import Document
from sar_kd.models.lora import add_adapter
from sar_kd.runtime.precision import Precision
from sar_kd.tokenization.tokenizer_pair import TokenizerPair
from tests.stress.harness import CPU, Run, build_gpt2


@pytest.fixture(scope="session")
def documents(corpus_texts):
    return [Document(str(number), text) for number, text in enumerate(corpus_texts)]


@pytest.fixture(scope="session")
def make_dataset(documents, byte_tokenizer, sp_tokenizer):
    """make_dataset(kind, rows): the same text for equal or different tokenizers; heads may have more rows."""
    made = {}

    def make(kind="equal", rows=0):
        if (kind, rows) not in made:
            student, teacher = {
                "equal": (byte_tokenizer, byte_tokenizer), "different": (sp_tokenizer, byte_tokenizer)
            }[kind]  # fmt: skip
            sizes = max(rows, len(student)), max(rows, len(teacher))
            pair = TokenizerPair(student, teacher, student_vocab_size=sizes[0], teacher_vocab_size=sizes[1])
            made[kind, rows] = build_dataset(documents, pair, 24, 60)
        return made[kind, rows]

    return make


@pytest.fixture
def make_run(make_dataset, make_student):
    """make_run(...): a step as the scripts make it, guards at their defaults, over tiny dense models.

    rows      rows of both heads, at least the tokenizer's
    head      factor on the student's head: a fresh one is all but uniform
    gpt2      a GPT-2 student instead of a Llama
    loss      fields of LossConfig; guards: fields of GuardConfig
    optimizer a value of --optimizer
    rank      of an adapter (LoRA), the rest frozen in the run's dtype; 0: all weights are trained
    """

    def make(
        *, dtype=torch.float16, kind="equal", rows=0, head=1.0, teacher_head=20.0, gpt2=False, scale=16384.0, lr=1e-3,
        loss=None, guards=None, config=None, rank=0, optimizer="adamw",
    ):  # fmt: skip
        dataset = make_dataset(kind, rows)
        sizes = max(rows, len(dataset.pair.student)), max(rows, len(dataset.pair.teacher))
        build = build_gpt2 if gpt2 else make_student
        student = build(sizes[0], **({"num_hidden_layers": 1} if not gpt2 else {}) | (config or {}))
        student.get_output_embeddings().weight.data.mul_(head)
        if rank:
            student = add_adapter(student.to(dtype), LoraConfig(lora_rank=rank))
        teacher = make_student(sizes[1], num_hidden_layers=1, hidden_size=16, intermediate_size=32)
        teacher.lm_head.weight.data.mul_(teacher_head)
        teacher.requires_grad_(False).eval().to(dtype)
        precision = Precision(CPU, dtype, scale)
        settings = LossConfig(**loss or {}), GuardConfig(**guards or {})
        return Run(dataset, student, teacher, precision, *settings, lr, optimizer)

    return make


@pytest.fixture
def row(record_property):
    """row(scenario, naive, ours): what the table says of this scenario, with the figures just measured."""

    def add(scenario: str, naive: str, ours: str) -> None:
        record_property("stress", [scenario, naive, ours])

    return add
