"""A whole training step beside TRL's trainers: the same models, the same examples, each side in its own process.

    PYTHON_WITH_TRL benchmarks/trl_trainers.py
    PYTHON_WITH_TRL benchmarks/trl_trainers.py --real benchmarks/models/real

Off-policy forward KL: ours, GKDTrainer (lmbda 0, beta 0) and GOLDTrainer (likewise; for different tokenizers its ULD
loss). On-policy reverse KL: ours (`--on_policy_fraction 1`), GKDTrainer (lmbda 1, beta 1), GOLDTrainer. Seconds a step
are the medians over all rounds of the time from the end of one step to the end of the next, so that data, logging and
sampling count. Memory is the peak of the process from the first step on, beyond what it had before it. Needs `trl` and
`datasets` beside this package's requirements.

`--real` measures the off-policy sides on the models that `real_models.py --prepare` leaves: the student is SmolLM2
without 10 of its layers; with equal tokenizers the teacher is SmolLM2, with different ones Gemma 3. A step is one
example that fills a block, all models are in float32 and have one chat template. GOLDTrainer refuses Gemma's tokenizer,
as it takes byte-level ones only; here it is given the byte offsets of that one too.
"""

from __future__ import annotations

import argparse
import bisect
import ctypes
import itertools
import json
import math
import os
import re
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

import safetensors  # noqa: E402
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
REAL_MODELS = ("smollm2", "gemma3", "smollm2_cut")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def models_of(folder: Path, side: str, options: argparse.Namespace) -> tuple[Path, Path]:
    """The folders of a side's teacher and student."""
    different = "different" in side
    if options.real:
        return folder / ("gemma3" if different else "smollm2"), folder / "smollm2_cut"
    return folder / "teacher", folder / ("different" if different else "student")


def make_inputs(folder: Path, options: argparse.Namespace) -> None:
    """Models and examples, the same for every side."""
    (text,) = embedded.read_text("transfer")
    texts = list(text.values())
    if options.real:
        write_examples(folder, texts, link_models(options.real, folder), options)
    else:
        write_examples(folder, texts, make_models(folder, texts, options), options)


def link_models(real: Path, folder: Path) -> list:
    """The real models with the same chat template; returns their tokenizers."""
    tokenizers = []
    for name in REAL_MODELS:
        (folder / name).mkdir()
        for file in ("config.json", "generation_config.json", "model.safetensors"):
            (folder / name / file).symlink_to((real / name / file).resolve(strict=True))
        tokenizers.append(transformers.AutoTokenizer.from_pretrained(real / name))
        tokenizers[-1].chat_template = TEMPLATE
        tokenizers[-1].save_pretrained(folder / name)
    return tokenizers


def make_models(folder: Path, texts: list[str], options: argparse.Namespace) -> list:
    """A teacher and two students with random weights; returns their tokenizers."""
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
    return tokenizers


def write_examples(folder: Path, texts: list[str], tokenizers: list, options: argparse.Namespace) -> None:
    """Conversations below a block in the tokens of every model, as GKDTrainer takes no longer ones."""

    def messages_of(words: list[str]) -> list[dict]:
        half = len(words) // 4
        sides = (("user", words[:half]), ("assistant", words[half:]))
        return [{"role": role, "content": " ".join(part)} for role, part in sides]

    def size_of(words: list[str]) -> int:
        messages = messages_of(words)
        return max(len(t.apply_chat_template(messages, tokenize=True)["input_ids"]) for t in tokenizers)

    with open(folder / "examples.jsonl", "w", encoding="utf-8") as file:
        for one in texts[:400]:
            words = one.split(" ")[: options.words]
            if options.real:  # the most words that fit
                sizes = range(len(words) + 1)
                count = bisect.bisect_left(sizes, options.block_size, key=lambda size: size_of(words[:size])) - 1
                words = words[:count] if count < len(words) else []
            if len(words) >= 4 and size_of(words) < options.block_size:
                file.write(json.dumps({"messages": messages_of(words)}) + "\n")


def run_ours(folder: Path, side: str, options: argparse.Namespace) -> dict:
    """Our own loop, logging as it does."""
    from sar_kd.api import distill
    from sar_kd.training import trainer

    watch, train_step = _Watch(options.device), trainer.train_step

    def timed(*args):
        watch.begin()
        report = train_step(*args)
        watch.tick()
        watch.tokens += report.num_target_tokens
        return report

    trainer.train_step = timed
    teacher, student = models_of(folder, side, options)
    on = {"on_policy_fraction": 1.0, "max_new_tokens": options.max_new_tokens, "kd_direction": "reverse"}
    with tempfile.TemporaryDirectory() as out:
        distill(
            teacher=str(teacher), student=str(student), mode="precise",
            texts=str(folder / "examples.jsonl"), validation_texts=str(folder / "few.jsonl"),
            alpha_kd=1.0, alpha_ce=0.0, model_dtype="float32", device=options.device, block_size=options.block_size,
            per_device_batch_size=options.batch_size, train_steps=options.steps, eval_steps=options.steps,
            save_steps=options.steps, student_lr=1e-4, output_dir=out + "/run", **(on if "_on" in side else {}),
        )  # fmt: skip
    return watch.figures(options.warm_up)


def run_trl(folder: Path, side: str, options: argparse.Namespace) -> dict:
    """TRL's trainer, as its documentation sets it up."""
    from datasets import Dataset

    watch = _Watch(options.device)

    class Callback(transformers.TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            watch.begin()

        def on_step_end(self, *args, **kwargs):
            watch.tick()

    on, gold, different = "_on" in side, "gold" in side, "different" in side
    teacher_path, student_path = models_of(folder, side, options)
    rows = [json.loads(line) for line in (folder / "examples.jsonl").read_text(encoding="utf-8").splitlines()]
    with tempfile.TemporaryDirectory() as out:
        common = {
            "output_dir": out, "max_steps": options.steps, "per_device_train_batch_size": options.batch_size,
            "gradient_accumulation_steps": 1, "learning_rate": 1e-4, "logging_steps": options.steps,
            "save_strategy": "no", "report_to": "none", "seed": 0, "bf16": False, "fp16": False,
            "use_cpu": options.device == "cpu",
            "gradient_checkpointing": False, "disable_tqdm": True, "max_length": options.block_size,
            "lmbda": float(on), "beta": float(on), "temperature": 1.0, "dataloader_drop_last": True,
        }  # fmt: skip
        if gold:
            from trl.experimental.gold import GOLDConfig as Settings
            from trl.experimental.gold import GOLDTrainer as Trainer

            common |= {"max_completion_length": options.max_new_tokens, "use_uld_loss": different}
            common |= {"teacher_tokenizer_name_or_path": str(teacher_path)} if different else {}
            common |= {"uld_use_hybrid_loss": True} if different else {}
            take_sentencepiece_()
        else:
            from trl.experimental.gkd import GKDConfig as Settings
            from trl.experimental.gkd import GKDTrainer as Trainer

            common |= {"max_new_tokens": options.max_new_tokens}
        tokenizer = transformers.AutoTokenizer.from_pretrained(student_path, padding_side="left")
        student, teacher = (
            transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
            for path in (student_path, teacher_path)
        )
        for parameter in itertools.chain(student.parameters(), teacher.parameters()):
            parameter.detach().sum()  # so that none is still in its file only when the first step begins
        trainer = Trainer(
            model=student, teacher_model=teacher.requires_grad_(False), args=Settings(**common),
            train_dataset=Dataset.from_list(rows), processing_class=tokenizer, callbacks=[Callback()],
        )  # fmt: skip
        trainer.train()
    return watch.figures(options.warm_up)


def take_sentencepiece_() -> None:
    """Let GOLDTrainer align a SentencePiece tokenizer with byte fallback as well."""
    from trl.experimental.gold import gold_trainer

    encode_byte_level = gold_trainer.encode_with_byte_offsets

    def encode(backend, texts: list[str], add_special_tokens: bool = False):
        if "ByteLevel" in repr(backend.pre_tokenizer) + repr(backend.decoder):
            return encode_byte_level(backend, texts, add_special_tokens)
        found = []
        for text, encoding in zip(texts, backend.encode_batch(texts, add_special_tokens=False), strict=True):
            is_byte = re.compile("<0x[0-9A-F]{2}>").fullmatch
            sizes = [1 if is_byte(t) else len(t.replace("\u2581", " ").encode()) for t in encoding.tokens]
            ends = list(itertools.accumulate(sizes, initial=0))
            assert ends[-1] == len(text.encode())
            found.append((encoding.ids, list(itertools.pairwise(ends))))
        return found

    gold_trainer.encode_with_byte_offsets = encode


class _Watch:
    """Seconds between the ends of steps, and the memory that they take, of the process or of the GPU's allocator."""

    def __init__(self, device: str):
        self._on_gpu = device == "cuda"
        self.ends: list[float] = []
        self.spent: list[float] = []
        self.tokens, self._before = 0, 0

    def begin(self) -> None:
        if self._before:
            return
        if self._on_gpu:
            self._before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        else:
            ctypes.CDLL(None).malloc_trim(0)  # what is free is no part of what there was before
            self._before = _status("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far

    def tick(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize()
        self.ends.append(time.monotonic())
        self.spent.append(time.process_time())

    def figures(self, warm_up: int) -> dict:
        steps, spent = ([b - a for a, b in itertools.pairwise(times)][warm_up:] for times in (self.ends, self.spent))
        return {
            "seconds": steps,
            "cpu_seconds": spent,
            "memory": (torch.cuda.max_memory_allocated() if self._on_gpu else _status("VmHWM")) - self._before,
            "tokens": self.tokens,
        }


def _status(name: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--real", type=Path, help="folder of the real models; by default small ones are made")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warm_up", type=int, default=3, help="steps beside the first that do not count")
    parser.add_argument("--vocab_size", type=int, default=32000, help="rows of the heads")
    parser.add_argument("--tokens", type=int, default=4096, help="of the tokenizers")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch_size", type=int, help="1 for real models, else 4")
    parser.add_argument("--block_size", type=int, default=256)
    parser.add_argument("--words", type=int, help="of an example; as many as fit for real models, else 110")
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--output", type=Path, help="benchmarks/results/real_trl.json, or trl_trainers.json")
    parser.add_argument("--only", nargs="+", help="these sides only")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.batch_size = options.batch_size or (1 if options.real else 4)
    options.words = options.words or (options.block_size if options.real else 110)  # no word is less than a token
    missing = [name for name in REAL_MODELS if options.real and not (options.real / name / "config.json").is_file()]
    if missing:
        parser.error(f"--real {options.real}: lacks {', '.join(missing)}; run real_models.py --prepare first")
    if options.steps < options.warm_up + 2:
        parser.error(f"--steps {options.steps}: nothing is left after the first and --warm_up {options.warm_up}")
    if options.side:
        run_side = run_ours if options.side.startswith("ours") else run_trl
        print("\n" + json.dumps(run_side(options.folder, options.side, options)))
        return
    groups = {title: sides for title, sides in SIDES.items() if not (options.real and title.startswith("on-policy"))}
    found: dict[str, list[dict]] = {side: [] for sides in groups.values() for side in sides}
    found = {side: runs for side, runs in found.items() if not options.only or side in options.only}
    with tempfile.TemporaryDirectory() as folder:
        make_inputs(Path(folder), options)
        lines = (Path(folder) / "examples.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        state = {title: state_size(models_of(Path(folder), sides[0], options)[1]) for title, sides in groups.items()}
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
    name = "real_trl.json" if options.real else "trl_trainers.json"
    output = options.output or ROOT / "benchmarks" / "results" / name
    output.write_text(json.dumps({"sizes": sizes, "state": state, "sides": rows}, indent=1) + "\n")
    print("| | step | beside ours | memory | beside ours |\n|---|---:|---:|---:|---:|")
    for title, sides in groups.items():
        ours = rows[sides[0]]
        for side in sides:
            row = rows[side]
            print(
                f"| {title}: {side.split('_')[0]} | {row['seconds']:.3f} s | {row['seconds'] / ours['seconds']:.2f} | "
                f"{row['memory'] / 1e6:.0f} MB | {row['memory'] / ours['memory']:.2f} |"
            )
    for title, size in state.items():
        print(f"{title}: gradients and Adam's moments are {size / 1e6:.0f} MB of the memory on every side")


def state_size(student: Path) -> int:
    """Bytes of a student's gradients and Adam's two moments, in float32."""
    with safetensors.safe_open(student / "model.safetensors", "pt") as file:
        return 12 * sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


def _median(runs: list[dict], name: str = "seconds") -> float:
    return statistics.median(value for run in runs for value in run[name])


if __name__ == "__main__":
    main()
