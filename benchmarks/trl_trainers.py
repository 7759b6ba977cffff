"""A whole training step beside TRL's trainers: the same models, the same examples, each side in its own process.

    PYTHON_WITH_TRL benchmarks/trl_trainers.py

Off-policy forward KL: ours, GKDTrainer (lmbda 0, beta 0) and GOLDTrainer (likewise; for different tokenizers its ULD
loss). On-policy reverse KL: ours (`--on_policy_fraction 1`), GKDTrainer (lmbda 1, beta 1), GOLDTrainer. Seconds a step
are the medians over all rounds of the time from the end of one step to the end of the next, so that data, logging and
sampling count. Memory is the peak of the process from the first step on, beyond what it had before it. Needs `trl` and
`datasets` beside this package's requirements.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import transformers  # noqa: E402

from sar_kd import embedded  # noqa: E402
from sar_kd.commands.build_embedded import byte_level_bpe  # noqa: E402

SIDES = {
    "off-policy, equal tokenizers": ("ours", "gkd", "gold"),
    "off-policy, different tokenizers": ("ours_different", "gold_different"),
    "on-policy, equal tokenizers": ("ours_on", "gkd_on", "gold_on"),
    "on-policy, different tokenizers": ("ours_on_different", "gold_on_different"),
}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WARM_UP = 3


def make_inputs(folder: Path, options: argparse.Namespace) -> None:
    """Teacher, students and examples, the same for every side."""
    (text,) = embedded.read_text("transfer")
    texts = list(text.values())
    torch.manual_seed(0)
    tokenizers: list = []
    for name, tokens, width, layers in (
        ("teacher", options.tokens, options.width * 2, options.layers * 2),
        ("student", options.tokens, options.width, options.layers),
        ("different", options.tokens // 2, options.width, options.layers),
    ):
        tokenizer = byte_level_bpe(texts, tokens - 3)
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
        tokenizer.chat_template = TEMPLATE
        size = options.vocab_size // (2 if name == "different" else 1)
        # GOLDTrainer fails where a student writes a row of its head that has no token.
        tokenizer.add_tokens([f"<|{number}|>" for number in range(size - len(tokenizer))])
        config = transformers.LlamaConfig(
            vocab_size=size,
            hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=4, max_position_embeddings=1024, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
        )  # fmt: skip
        tokenizers.append(tokenizer)
        transformers.LlamaForCausalLM(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    with open(folder / "examples.jsonl", "w", encoding="utf-8") as file:
        for one in texts[:400]:
            words = one.split(" ")[: options.words]
            half = len(words) // 4
            if half:
                sides = (("user", words[:half]), ("assistant", words[half:]))
                messages = [{"role": role, "content": " ".join(part)} for role, part in sides]
                sizes = [len(t.apply_chat_template(messages, tokenize=True)["input_ids"]) for t in tokenizers]
                if max(sizes) < options.block_size:  # GKDTrainer takes no longer ones
                    file.write(json.dumps({"messages": messages}) + "\n")


def run_ours(folder: Path, side: str, options: argparse.Namespace) -> dict:
    """Our own loop, logging as it does."""
    from sar_kd.api import distill
    from sar_kd.training import trainer

    watch, train_step = _Watch(), trainer.train_step

    def timed(*args):
        watch.begin()
        report = train_step(*args)
        watch.tick()
        watch.tokens += report.num_target_tokens
        return report

    trainer.train_step = timed
    student = "different" if "different" in side else "student"
    on = {"on_policy_fraction": 1.0, "max_new_tokens": options.max_new_tokens, "kd_direction": "reverse"}
    with tempfile.TemporaryDirectory() as out:
        distill(
            teacher=str(folder / "teacher"), student=str(folder / student), mode="precise",
            texts=str(folder / "examples.jsonl"), validation_texts=str(folder / "few.jsonl"),
            alpha_kd=1.0, alpha_ce=0.0, model_dtype="float32", device="cpu", block_size=options.block_size,
            per_device_batch_size=options.batch_size, train_steps=options.steps, eval_steps=options.steps,
            save_steps=options.steps, student_lr=1e-4, output_dir=out + "/run", **(on if "_on" in side else {}),
        )  # fmt: skip
    return watch.figures()


def run_trl(folder: Path, side: str, options: argparse.Namespace) -> dict:
    """TRL's trainer, as its documentation sets it up."""
    from datasets import Dataset

    watch = _Watch()

    class Callback(transformers.TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            watch.begin()

        def on_step_end(self, *args, **kwargs):
            watch.tick()

    on, gold, different = "_on" in side, "gold" in side, "different" in side
    rows = [json.loads(line) for line in (folder / "examples.jsonl").read_text(encoding="utf-8").splitlines()]
    with tempfile.TemporaryDirectory() as out:
        common = {
            "output_dir": out, "max_steps": options.steps, "per_device_train_batch_size": options.batch_size,
            "gradient_accumulation_steps": 1, "learning_rate": 1e-4, "logging_steps": options.steps,
            "save_strategy": "no", "report_to": "none", "seed": 0, "bf16": False, "fp16": False, "use_cpu": True,
            "gradient_checkpointing": False, "disable_tqdm": True, "max_length": options.block_size,
            "lmbda": float(on), "beta": float(on), "temperature": 1.0, "dataloader_drop_last": True,
        }  # fmt: skip
        if gold:
            from trl.experimental.gold import GOLDConfig as Settings
            from trl.experimental.gold import GOLDTrainer as Trainer

            common |= {"max_completion_length": options.max_new_tokens, "use_uld_loss": different}
            common |= {"teacher_tokenizer_name_or_path": str(folder / "teacher")} if different else {}
            common |= {"uld_use_hybrid_loss": True} if different else {}
        else:
            from trl.experimental.gkd import GKDConfig as Settings
            from trl.experimental.gkd import GKDTrainer as Trainer

            common |= {"max_new_tokens": options.max_new_tokens}
        name = "different" if different else "student"
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder / name, padding_side="left")
        student = transformers.AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32)
        teacher = transformers.AutoModelForCausalLM.from_pretrained(folder / "teacher", dtype=torch.float32)
        trainer = Trainer(
            model=student, teacher_model=teacher.requires_grad_(False), args=Settings(**common),
            train_dataset=Dataset.from_list(rows), processing_class=tokenizer, callbacks=[Callback()],
        )  # fmt: skip
        trainer.train()
    return watch.figures()


class _Watch:
    """Seconds between the ends of steps, and the memory that they take."""

    def __init__(self):
        self.ends: list[float] = []
        self.spent: list[float] = []
        self.tokens, self._before = 0, 0

    def begin(self) -> None:
        if not self._before:
            self._before = _status("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far

    def tick(self) -> None:
        self.ends.append(time.monotonic())
        self.spent.append(time.process_time())

    def figures(self) -> dict:
        steps, spent = ([b - a for a, b in itertools.pairwise(times)][WARM_UP:] for times in (self.ends, self.spent))
        return {
            "seconds": steps,
            "cpu_seconds": spent,
            "memory": _status("VmHWM") - self._before,
            "tokens": self.tokens,
        }


def _status(name: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--vocab_size", type=int, default=32000, help="rows of the heads")
    parser.add_argument("--tokens", type=int, default=4096, help="of the tokenizers")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--block_size", type=int, default=256)
    parser.add_argument("--words", type=int, default=110, help="of an example")
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "trl_trainers.json")
    parser.add_argument("--only", nargs="+", help="these sides only")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        run_side = run_ours if options.side.startswith("ours") else run_trl
        print("\n" + json.dumps(run_side(options.folder, options.side, options)))
        return
    found: dict[str, list[dict]] = {side: [] for sides in SIDES.values() for side in sides}
    found = {side: runs for side, runs in found.items() if not options.only or side in options.only}
    with tempfile.TemporaryDirectory() as folder:
        make_inputs(Path(folder), options)
        lines = (Path(folder) / "examples.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (Path(folder) / "few.jsonl").write_text("".join(lines[:4]), encoding="utf-8")
        for number in range(options.rounds):
            for side in found:
                command = [sys.executable, __file__, *sys.argv[1:], "--side", side, "--folder", folder]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise SystemExit(f"{side}: {done.stderr[-3000:]}")
                found[side].append(json.loads(done.stdout.splitlines()[-1]))
                shown = f"{_median(found[side]):.3f} s a step, CPU {_median(found[side], 'cpu_seconds'):.3f} s"
                print(f"round {number + 1}, {side}: {shown}", file=sys.stderr, flush=True)
    sizes = {k: v for k, v in vars(options).items() if isinstance(v, int)}
    if options.only:
        return
    rows = {
        side: {"seconds": _median(runs), "memory": statistics.median(run["memory"] for run in runs), "runs": runs}
        for side, runs in found.items()
    }
    options.output.write_text(json.dumps({"sizes": sizes, "sides": rows}, indent=1) + "\n")
    print("| | step | beside ours | memory | beside ours |\n|---|---:|---:|---:|---:|")
    for title, sides in SIDES.items():
        ours = rows[sides[0]]
        for side in sides:
            row = rows[side]
            print(
                f"| {title}: {side.split('_')[0]} | {row['seconds']:.3f} s | {row['seconds'] / ours['seconds']:.2f} | "
                f"{row['memory'] / 1e6:.0f} MB | {row['memory'] / ours['memory']:.2f} |"
            )


def _median(runs: list[dict], name: str = "seconds") -> float:
    return statistics.median(value for run in runs for value in run[name])


if __name__ == "__main__":
    main()
