"""Kill a run with SIGKILL at random moments and resume it: does it end as if nothing had happened?

    python benchmarks/kills.py --kills 200

A short float16 run of tiny models, a checkpoint after every step. Each trial starts it again in its own process,
kills that at a random moment (two of four: behind its start; one: while a checkpoint is being written), resumes it as a
user would, and compares weights, optimizer, loss scale, random numbers, counters, the saved student and
`metrics.jsonl` with those of a run that was never killed, bit for bit. The report goes to the terminal and to
`benchmarks/results/kills.md`. Exit code 1 unless every trial ends equal.
"""

from __future__ import annotations

import argparse
import collections
import importlib.util
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # before its threads exist: this process forks

import torch
import transformers

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from sar_kd import embedded  # noqa: E402
from sar_kd.commands import main as command_line  # noqa: E402
from sar_kd.commands.build_embedded import byte_level_bpe  # noqa: E402

STEPS = 12
_TIMING = {
    "tokens_per_second", "peak_memory_bytes", "wall_seconds", "seconds", "train_seconds", "time", "environment",
}  # fmt: skip


def build_inputs(folder: Path) -> list[str]:
    """Two tiny models with one tokenizer, and a text; the flags of a short run over them."""
    texts = list(embedded.read_text("validation")[0].values())[:20]
    transformers.utils.logging.disable_progress_bar()
    tokenizer = byte_level_bpe(texts, 400)
    settings = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2,
        "num_key_value_heads": 2, "num_hidden_layers": 1, "max_position_embeddings": 64, "attention_dropout": 0.1,
    }  # fmt: skip
    torch.manual_seed(1)
    for name in ("student", "teacher"):
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "text.txt").write_text("\n".join(texts)[:20000], encoding="utf-8")
    values = {
        "teacher_model": folder / "teacher", "student_model": folder / "student", "train_file": folder / "text.txt",
        "block_size": 32, "train_steps": STEPS, "eval_steps": 4, "save_steps": 1, "log_steps": 4, "device": "cpu",
        "per_device_batch_size": 2, "student_lr": 1e-3, "warmup_steps": 2,
    }  # fmt: skip
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def start(argv: list[str]) -> int:
    """The script in a process of its own, silent; its process id."""
    spec = importlib.util.spec_from_file_location("script", ROOT / "train_sar_kd_fp16_safe.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        code = command_line.run(script.main, argv)
    finally:
        os._exit(code)


def finish(pid: int) -> int:
    """Wait for a process; its exit code, negative if a signal ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def end_of(folder: Path) -> dict:
    """Everything in which two finished runs could differ, timing apart."""
    latest = folder / "checkpoint" / (folder / "checkpoint" / "latest").read_text()
    state = torch.load(latest / "state.pt", weights_only=True)
    return {
        "student": (folder / "student" / "model.safetensors").read_bytes(),
        "checkpoint": (latest / "student.safetensors").read_bytes(),
        "state": [tensor.tolist() if isinstance(tensor, torch.Tensor) else tensor for tensor in _leaves(state)],
        "progress": _untimed(json.loads((latest / "progress.json").read_text())),
        "metrics": [_untimed(json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines()],
        "summary": _untimed(json.loads((folder / "summary.json").read_text())),
    }


def _leaves(state):
    if isinstance(state, dict):
        for key in sorted(state, key=str):
            yield key
            yield from _leaves(state[key])
    elif isinstance(state, (list, tuple)):
        for item in state:
            yield from _leaves(item)
    else:
        yield state


def _untimed(record):
    if isinstance(record, dict):
        return {key: _untimed(value) for key, value in record.items() if key not in _TIMING}
    return record


def _wait_for_a_write(folder: Path, pid: int, after: int) -> bool:
    """Until a checkpoint behind step `after` is being written; false if the run ends first."""

    def is_writing() -> bool:
        names = os.listdir(folder / "checkpoint") if (folder / "checkpoint").is_dir() else []
        return any(name.startswith(".step-") and int(name[6:14]) > after for name in names)

    return _wait(is_writing, pid)


def _wait(condition: Callable[[], bool], pid: int) -> bool:
    """Until it holds; false if the run ends first."""
    while not (found := condition()) and os.waitpid(pid, os.WNOHANG) == (0, 0):
        pass
    return found


def phase_of(folder: Path) -> str:
    """Where a kill has met the run, by what it left."""
    checkpoint = folder / "checkpoint"
    if not (folder / "config.json").exists():
        return "before the run folder was there"
    if checkpoint.exists() and any(path.name.endswith(".partial") for path in checkpoint.iterdir()):
        return "inside a checkpoint write"
    if (folder / ".student.partial").exists():
        return "inside a student's saving"
    return "between writes" if (checkpoint / "latest").exists() else "before the first checkpoint"


def _killed(number: int, argv: list[str], folder: Path, seconds: float, chance: random.Random) -> bool:
    """Start the run and kill it; false if it ended first."""
    pid, running = start(argv), True
    if number % 4 == 3:
        running = _wait_for_a_write(folder, pid, chance.randrange(STEPS - 1))
        seconds = 0.01
    elif number % 4:  # most of a run on a busy machine is its start
        running = _wait((folder / "config.json").is_file, pid)
        seconds /= 2
    time.sleep(chance.uniform(0.0, seconds))
    if not running or os.waitpid(pid, os.WNOHANG) != (0, 0):
        return False
    os.kill(pid, signal.SIGKILL)
    return finish(pid) == -signal.SIGKILL


def trial(number: int, inputs: list[str], folder: Path, seconds: float, seed: int) -> tuple[str, int]:
    """Start, kill, resume to the end; where the kill met the run, and the resumed run's exit code."""
    chance = random.Random(f"{seed} {number}")
    argv = [*inputs, "--output_dir", str(folder)]
    shutil.rmtree(folder, ignore_errors=True)
    while not _killed(number, argv, folder, seconds, chance):
        shutil.rmtree(folder, ignore_errors=True)
    phase = phase_of(folder)
    if (folder / "checkpoint" / "latest").exists():
        return phase, finish(start(["--resume", "--output_dir", str(folder)]))
    again = [*argv, "--overwrite"] if (folder / "config.json").exists() else argv
    return phase, finish(start(again))


def kill(count: int, seed: int, say=lambda line: None) -> tuple[collections.Counter, list[str]]:
    """Make `count` trials; how many kills met which phase, and what went wrong."""
    phases, wrong = collections.Counter(), []
    with tempfile.TemporaryDirectory() as place:
        inputs = build_inputs(Path(place))
        folder = Path(place) / "run"
        started = time.monotonic()
        assert finish(start([*inputs, "--output_dir", str(folder)])) == 0
        seconds = time.monotonic() - started
        undisturbed = end_of(folder)
        for number in range(count):
            phase, code = trial(number, inputs, folder, seconds, seed)
            phases[phase] += 1
            if code:
                wrong.append(f"kill {number} {phase}: resumed run ended with {code}")
                continue
            ended = end_of(folder)
            wrong += [f"kill {number} {phase}: {part} differs" for part in ended if ended[part] != undisturbed[part]]
            if (number + 1) % 20 == 0:
                say(f"{number + 1} of {count}, {len(wrong)} wrong")
    return phases, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "kills.md")
    options = parser.parse_args()
    phases, wrong = kill(options.kills, options.seed, lambda line: print(line, file=sys.stderr, flush=True))
    lines = ["| the kill came | kills |", "|---|---:|", *(f"| {phase} | {n} |" for phase, n in phases.most_common())]
    bad = len({line.split(":")[0] for line in wrong})
    verdict = f"{options.kills - bad} of {options.kills} killed runs ended, resumed, as the one never touched."
    text = "\n".join([*lines, "", verdict, *(f"- {line}" for line in wrong)])
    print(text)
    made = f"Made by `python benchmarks/kills.py --kills {options.kills} --seed {options.seed}`."
    options.output.write_text(f"# Runs killed at random moments\n\n{made}\n\n{text}\n", encoding="utf-8")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
