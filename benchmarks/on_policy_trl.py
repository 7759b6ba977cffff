"""On-policy distillation here and in TRL's trainers: equal starts, prompts, steps and rates.

    PYTHON_WITH_TRL benchmarks/on_policy_trl.py

Unit conversion, the teacher of `on_policy.py`, and students of the embedded one's shape with the teacher's tokenizer or
another (GOLD takes byte-level BPE only), trained on the embedded text and fine-tuned shortly before. On-policy reverse
KL at temperature 1 for all: ours, GKDTrainer (lmbda 1, beta 1) and GOLDTrainer (likewise; across tokenizers its hybrid
ULD loss). AdamW, its rate and the clip are the same; the students are evaluated by our own benchmark. Needs `trl` and
`datasets` beside this package's requirements.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import torch  # noqa: E402
import transformers  # noqa: E402
from on_policy import MODELS, fine_tune, spread_of  # noqa: E402

from sar_kd import embedded  # noqa: E402
from sar_kd.commands import build_embedded  # noqa: E402
from sar_kd.data import unit_questions  # noqa: E402
from sar_kd.data.dataset import build_dataset  # noqa: E402
from sar_kd.data.unit_questions import task_questions  # noqa: E402
from sar_kd.evaluation.perplexity import evaluate  # noqa: E402
from sar_kd.evaluation.question_answering import answer_questions  # noqa: E402
from sar_kd.runtime.precision import Precision  # noqa: E402
from sar_kd.tokenization.tokenizer_pair import TokenizerPair  # noqa: E402

STUDENTS = {
    "equal": lambda texts: transformers.AutoTokenizer.from_pretrained(embedded.TEACHER_DIR),
    "different": lambda texts: build_embedded.byte_level_bpe(texts, 1024),
}
"""The tokenizer of each student"""
SIDES = {
    "equal tokenizers": ("ours_equal", "gkd_equal", "gold_equal"),
    "different tokenizers": ("ours_different", "gold_different"),
}
# The task's questions as our own loop reads them: no roles, the end token first and last.
TEMPLATE = (
    "{{ eos_token }}{% for message in messages %}{{ message.content }}{% endfor %}"
    "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
)
BATCH_SIZE, MAX_NEW_TOKENS, WARM_UP, RATE = 16, 48, 20, 5e-4
PRETRAINING_STEPS = 200


def make_student(kind: str) -> Path:
    """A student trained on the embedded text, below `MODELS`, unless that was done before."""
    folder = MODELS / f"{kind}_pretrained"
    if not (folder / "tokenizer.json").is_file():
        (texts,) = embedded.read_text("teacher")
        tokenizer = STUDENTS[kind](list(texts.values()))
        config = build_embedded.student_model().config
        config.vocab_size = len(tokenizer)
        config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config)
        build_embedded.pretrain(model, build_embedded.dataset_of(tokenizer, texts), PRETRAINING_STEPS, 0.0, 0, kind)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def run_ours(student: Path, output: Path, options: argparse.Namespace) -> Path:
    """Our own loop."""
    from sar_kd.api import distill

    model = transformers.AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(student)
    distill(
        str(MODELS / "teacher/student"), (model, tokenizer), mode="precise", task="units", task_teacher_steps=0,
        skip_baseline=True, on_policy_fraction=1.0, kd_direction="reverse", alpha_kd=1.0, alpha_ce=0.0, temperature=1.0,
        per_device_batch_size=BATCH_SIZE, max_new_tokens=MAX_NEW_TOKENS, student_lr=RATE, warmup_steps=WARM_UP,
        lr_schedule="constant", model_dtype="float32", train_steps=options.train_steps, eval_steps=options.train_steps,
        save_steps=options.train_steps, seed=options.seed, output_dir=str(output),
    )  # fmt: skip
    # In place, to the last step; the folder keeps the one of the lowest perplexity, and TRL keeps none.
    model.save_pretrained(output / "last")
    tokenizer.save_pretrained(output / "last")
    return output / "last"


def run_trl(side: str, student: Path, output: Path, options: argparse.Namespace) -> Path:
    """TRL's trainer on the same questions."""
    from datasets import Dataset

    name, _, kind = side.partition("_")
    rows = [
        {"messages": [{"role": message.role, "content": message.content} for message in conversation.messages]}
        for conversation in task_questions("train")
    ]
    common = {
        "output_dir": str(output / "trainer"), "max_steps": options.train_steps, "learning_rate": RATE,
        "per_device_train_batch_size": BATCH_SIZE, "gradient_accumulation_steps": 1, "weight_decay": 0.01,
        "adam_beta2": 0.95, "max_grad_norm": 1.0, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": WARM_UP,
        "lmbda": 1.0, "beta": 1.0, "temperature": 1.0, "max_length": 256, "seed": options.seed, "bf16": False,
        "fp16": False, "use_cpu": True, "gradient_checkpointing": False, "save_strategy": "no", "report_to": "none",
        "disable_tqdm": True, "logging_steps": options.train_steps,
    }  # fmt: skip
    if name == "gold":
        from trl.experimental.gold import GOLDConfig as Settings
        from trl.experimental.gold import GOLDTrainer as Trainer

        common |= {"max_completion_length": MAX_NEW_TOKENS, "use_uld_loss": kind == "different"}
        if kind == "different":
            common |= {"teacher_tokenizer_name_or_path": str(_templated(MODELS / "teacher/student", output))}
            common |= {"uld_use_hybrid_loss": True}
    else:
        from trl.experimental.gkd import GKDConfig as Settings
        from trl.experimental.gkd import GKDTrainer as Trainer

        common |= {"max_new_tokens": MAX_NEW_TOKENS}
    model = transformers.AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    teacher = transformers.AutoModelForCausalLM.from_pretrained(MODELS / "teacher/student", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(_templated(student, output), padding_side="left")
    _check_rendering(tokenizer, student, rows[0]["messages"])
    trainer = Trainer(
        model=model, teacher_model=teacher.requires_grad_(False), args=Settings(**common),
        train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    model.save_pretrained(output / "student")
    transformers.AutoTokenizer.from_pretrained(student).save_pretrained(output / "student")
    return output / "student"


def _templated(model: Path, folder: Path) -> Path:
    """The model's tokenizer with `TEMPLATE`, in a folder of its own."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = TEMPLATE
    # One that no question has: where padding is the end token, TRL leaves the end of a response out of its loss.
    tokenizer.pad_token = "\u0100"  # the byte 0 in byte-level BPE
    tokenizer.save_pretrained(folder / model.parent.name)
    return folder / model.parent.name


def _check_rendering(tokenizer, student: Path, messages: list[dict]) -> None:
    """Both sides are to read the very same tokens: what is fine-tuned on one rendering knows no other."""
    own = transformers.AutoTokenizer.from_pretrained(student)
    pair = TokenizerPair(own, own, student_vocab_size=len(own), teacher_vocab_size=len(own))
    (ours,) = build_dataset(task_questions("train")[:1], pair, 256, 256).micro_batches(0, 1, 1, 0)
    theirs = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer(theirs, add_special_tokens=False)["input_ids"] == ours.student.input_ids[0].tolist()


def asked(folder: Path) -> dict:
    """Accuracy and answer rate on the test questions, and bits per byte of their right answers."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    pair = TokenizerPair(tokenizer, tokenizer, student_vocab_size=len(tokenizer), teacher_vocab_size=len(tokenizer))
    precision = Precision(torch.device("cpu"), torch.float32, 1.0)
    corpus = build_dataset(task_questions("test"), pair, 256, 256)
    result = answer_questions(model, corpus, unit_questions.questions("test", unit_questions.COUNTS["test"]), precision)
    bits = evaluate(model, corpus.token_batches("student", 64), corpus.text.num_bytes, precision).bits_per_byte
    return {"accuracy": result.accuracy, "answer_rate": result.answer_rate, "bits_per_byte": bits}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--train_steps", type=int, default=300)
    parser.add_argument(
        "--sides", nargs="+", choices=sum(SIDES.values(), ()), help="others stay as the output has them"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "on_policy_trl.json")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.chdir(ROOT)
    if options.side:
        student = MODELS / options.side.partition("_")[2] / "student"
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "run"
            if options.side.startswith("ours"):
                found = asked(run_ours(student, output, options))
            else:
                found = asked(run_trl(options.side, student, output, options))
        print("\n" + json.dumps(found))
        return
    fine_tune("teacher")
    record: dict = {"train_steps": options.train_steps, "seeds": options.seeds, "start": {}, "sides": {}}
    for kind in STUDENTS:
        fine_tune(kind, ("--student_model", str(make_student(kind)), "--learning_rate", "2e-3"))
        record["start"][kind] = asked(MODELS / kind / "student")
    if options.sides and options.output.is_file():
        record["sides"] = json.loads(options.output.read_text())["sides"]
    for sides in SIDES.values():
        for side in (side for side in sides if not options.sides or side in options.sides):
            record["sides"][side] = [_in_a_process(side, seed, options) for seed in options.seeds]
            options.output.write_text(json.dumps(record, indent=1) + "\n")
    print("| | accuracy | sd | answer rate | bits per byte |\n|---|---:|---:|---:|---:|")
    for title, sides in SIDES.items():
        kind = sides[0].partition("_")[2]
        print(_row(f"{title}: at the start", [record["start"][kind]]))
        for side in (side for side in sides if side in record["sides"]):
            print(_row(f"{title}: {side.partition('_')[0]}", record["sides"][side]))


def _in_a_process(side: str, seed: int, options: argparse.Namespace) -> dict:
    command = [sys.executable, __file__, "--side", side, "--seed", str(seed), "--train_steps", str(options.train_steps)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"{side}: {done.stderr[-3000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"{side}, seed {seed}: {found}", file=sys.stderr, flush=True)
    return found


def _row(title: str, found: list[dict]) -> str:
    accuracies = [one["accuracy"] for one in found]
    rest = " | ".join(f"{statistics.mean(one[name] for one in found):{form}}" for name, form in _REST)
    return f"| {title} | {statistics.mean(accuracies):.3f} | {spread_of(accuracies):.3f} | {rest} |"


_REST = (("answer_rate", ".3f"), ("bits_per_byte", ".4f"))


if __name__ == "__main__":
    main()
