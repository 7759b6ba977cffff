"""What alignment costs: a distillation step across tokenizers beside one with equal tokenizers of the same sizes.

    python benchmarks/alignment_cost.py                                   # the embedded pair's shapes
    python benchmarks/alignment_cost.py --shape large --vocab_size 16000 --batch_size 2 --warmup 6 --steps 12

Same architectures, same vocabulary sizes, same text, one process; whole steps, collation included, in turns. The
models are random, because the cost of a step does not depend on the weights. `large` is a student of 8 layers with 512
features and a teacher of 12 layers with 768: there the work on each logit is small beside the products.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
from paired import LARGE, ROOT, make_model

from sar_kd import embedded
from sar_kd.commands.build_embedded import byte_level_bpe, sentencepiece_bpe, student_model, teacher_model
from sar_kd.config.presets import MODES
from sar_kd.config.runs import Config
from sar_kd.data.dataset import build_dataset
from sar_kd.data.files.samples import Document
from sar_kd.losses.objective import Objective
from sar_kd.runtime.precision import setup_precision
from sar_kd.tokenization.tokenizer_pair import TokenizerPair
from sar_kd.training.guards import StepGuard
from sar_kd.training.optimizer import build_optimizer
from sar_kd.training.step import StepContext, train_step

RESULT = ROOT / "benchmarks" / "results" / "alignment_cost.json"
BLOCK_SIZE = 256


SHAPES = {
    "embedded": lambda tokenizers: (student_model(), teacher_model()),
    "large": lambda tokenizers: tuple(
        make_model(shape, len(tokenizer), tokenizer.eos_token_id)
        for shape, tokenizer in zip(reversed(LARGE), tokenizers, strict=True)
    ),
}


class Run:
    """One pair of models on one text, ready to step."""

    def __init__(self, config: Config, texts: dict[str, str], student_tokenizer, teacher_tokenizer, options):
        self.config = config
        self.precision = setup_precision(config.precision, config.train.seed)
        student, teacher = SHAPES[options.shape]((student_tokenizer, teacher_tokenizer))
        # A text may have fewer pieces than were asked for: heads are as large all the same.
        rows = max(len(student_tokenizer), len(teacher_tokenizer))
        for model in (student, teacher):
            model.resize_token_embeddings(rows)
        teacher.requires_grad_(False).eval()
        pair = TokenizerPair(student_tokenizer, teacher_tokenizer, student_vocab_size=rows, teacher_vocab_size=rows)
        self.corpus = build_dataset(
            [Document(*item) for item in texts.items()],
            pair,
            BLOCK_SIZE,
            8 * BLOCK_SIZE,
            loss_workspace_mb=config.loss.loss_workspace_mb,
        )
        self.objective = Objective(teacher, student, config.loss, self.corpus.aligner, self.precision)
        self.optimizer = build_optimizer(student, config.optim, self.objective.parameters())
        self.guard = StepGuard(config.guards)
        self.step = 0

    def attempt(self) -> tuple[float, float]:
        """Seconds of one step, and the tokens that both models read in it."""
        started = time.perf_counter()
        batches = self.corpus.micro_batches(self.step, self.config.train.per_device_batch_size, 1, 0)
        train_step(batches, StepContext(self.objective, self.optimizer, self.guard, self.precision, 1.0))
        seconds = time.perf_counter() - started
        self.step += 1
        return seconds, sum(batch.student.input_ids.numel() + batch.teacher.input_ids.numel() for batch in batches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--warmup", type=int, default=60, help="steps before; the maps of the text are made in them")
    parser.add_argument("--vocab_size", type=int, nargs="+", default=[1024, 2048, 8192])
    parser.add_argument("--shape", choices=SHAPES, default="embedded")
    parser.add_argument("--batch_size", type=int, default=4, help="blocks of 256 tokens in a step")
    options = parser.parse_args()
    config = Config.from_options(dict(MODES["precise"]) | {"per_device_batch_size": options.batch_size}, "precise")
    (texts,) = embedded.read_text("transfer")
    results = []
    for size in options.vocab_size:
        byte, sentencepiece = (make(list(texts.values()), size) for make in (byte_level_bpe, sentencepiece_bpe))
        runs = {
            "equal": Run(config, texts, sentencepiece, sentencepiece, options),
            "aligned": Run(config, texts, sentencepiece, byte, options),
        }
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        tokens: dict[str, list[int]] = {name: [] for name in runs}
        for number in range(options.warmup + options.steps):
            for name, run in runs.items():
                took, read = run.attempt()
                if number >= options.warmup:
                    seconds[name].append(took)
                    tokens[name].append(read)
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        ratios = sorted(b / a for a, b in zip(seconds["equal"], seconds["aligned"], strict=True))
        results.append(
            {
                "vocab_size": size,
                "equal_ms": 1e3 * medians["equal"],
                "aligned_ms": 1e3 * medians["aligned"],
                "ratio_of_medians": medians["aligned"] / medians["equal"],
                "median_of_ratios": statistics.median(ratios),
                "tokens_read": {name: statistics.mean(values) for name, values in tokens.items()},
            }
        )
        print(json.dumps(results[-1]))
    record = json.loads(RESULT.read_text()) if RESULT.is_file() else {}
    record[options.shape] = {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "steps": options.steps,
        "batch_size": options.batch_size,
        "sizes": results,
    }
    RESULT.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
