"""Is every guard covered by a scenario? Remove the guards one at a time and see which scenarios of the suite fail.

    python benchmarks/guard_mutations.py [--only WORD ...]

Each mutation changes one place of a copy of the package, by its text, and runs `tests/stress/test_fp16.py` on the copy,
or the tests that it names.
The table goes to the terminal and to `benchmarks/results/guard_mutations.md`. Exit code 1 if a mutation is caught by no
scenario; `tests/test_mutations.py` checks that every text is still there.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
SUITE = "tests/stress/test_fp16.py"
RANGE, HALF = "tests/stress/test_float16_range.py", "tests/models/test_half_precision.py"
RECOVERY, GUARDS, STEP = "tests/stress/test_recovery.py", "tests/training/test_guards.py", "tests/training/test_step.py"
TILES, LOSSES = "tests/losses/test_tiled_loss.py", "tests/losses/test_distillation.py"
MODELS, ROUTERS = "tests/stress/test_nonfinite_models.py", "tests/teacher/moe/test_router_training.py"
ADAPTERS, LORA = "tests/stress/test_adapters.py", "tests/models/test_lora.py"
DATASET, FILES = "tests/data/test_dataset.py", "tests/models/test_model_files.py"
TOKENS, ROWS = "tests/tokenization/test_vocabulary_cut.py", "tests/commands/test_shrink_tokens.py"
HAND_OVER, EXPORT = "tests/commands/test_hand_over.py", "tests/commands/test_export.py"
ANSWERS, SERVED = "tests/teacher/cache/test_logprobs.py", "tests/teacher/cache/test_elsewhere.py"
EXPERTS = "tests/teacher/moe/test_expert_cut.py"


class Mutation(NamedTuple):
    """One guard taken away."""

    guard: str
    """What is lost"""
    module: str
    text: str
    """What stands there, once"""
    changed: str
    suite: str = SUITE


MUTATIONS = (
    # the logits and the loss
    Mutation("logit clamp: centred before it is bounded", "losses/objective.py",
             "self.logit_clamp = LogitClamp(config.logit_clamp_style, config.logit_clamp)",
             'self.logit_clamp = LogitClamp("raw", config.logit_clamp)'),
    Mutation("logit clamp: no target counts for less than -10", "losses/functional.py",
             "_FloorStraightThrough.apply(log_probs, -2.0 * self.bound) if", "log_probs if"),
    Mutation("loss clamp: a bound at all", "losses/functional.py",
             'above = 0.0 if self.style == "hard" else self.limit / loss', "above = 1.0"),
    Mutation("loss clamp: the gradient is kept", "losses/functional.py",
             'above = 0.0 if self.style == "hard" else self.limit / loss', "above = 0.0"),
    Mutation("positions of which a cut teacher tells too little are counted", "losses/projection/loss.py",
             "return *sums, is_infinite.sum(), (is_finite & ~mask).sum()",
             "return *sums, is_infinite.sum(), is_infinite.sum()", suite=LOSSES),
    Mutation("losses in float32", "models/lm_head.py",
             "tile = states.new_empty((len(head.weight), padded.shape[1]), dtype=torch.float32)",
             "tile = states.new_empty((len(head.weight), padded.shape[1]), dtype=torch.float16)"),
    Mutation("divergence in float32", "models/logit_tiles.py",
             "return cls(tile, peaks, -log_sums, 1.0 / temperature)",
             "return cls(tile.half(), peaks.half(), -log_sums.half(), 1.0 / temperature)"),
    Mutation("the shared tokens of two heads", "losses/distillation.py",
             "shared = min(len(student), len(whole))", "shared = len(student)"),
    Mutation("preflight refuses a clamp that saturates", "preflight/clamp_checks.py",
             "if saturated > 0.5:", "if saturated > 1.5:"),
    # what is finite
    Mutation("student logits are checked before any clamp", "losses/tiled_loss.py",
             "self.nonfinite = self.nonfinite + (~is_finite).sum()",
             "self.nonfinite = self.nonfinite + (~is_finite).sum() * 0"),
    Mutation("the loss is checked", "training/step.py",
             "forward_finite=nonfinite_positions == 0 and math.isfinite(total),",
             "forward_finite=nonfinite_positions == 0,"),
    Mutation("a bad forward is refused", "training/guards.py",
             "        if not forward_finite:\n", "        if False:\n"),
    Mutation("a norm that is not finite is refused", "training/guards.py",
             "        if not math.isfinite(grad_norm):\n"
             '            return "overflow" if loss_scale > MIN_LOSS_SCALE else "gradient"\n'
             '        return None if grad_norm <= limit else "norm"',
             '        return "norm" if grad_norm > limit else None'),
    Mutation("teacher positions that are not finite are left out", "losses/distillation.py",
             "        if grad_side is None:\n            return self._loss(log_p, log_t, keep)\n",
             "        keep = keep | True\n"),
    Mutation("a position without any token is not finite", "models/logit_tiles.py",
             "return (peaks > MASKED_BELOW) & (peaks < math.inf)", "return peaks < math.inf", TILES),
    Mutation("a masked token of a head is no fault", "models/lm_head.py",
             "torch.addmm(bias.clamp_min(MASKED_LOGIT), a, b, out=out)", "torch.addmm(bias, a, b, out=out)", TILES),
    Mutation("a masked target has an infinite loss", "losses/tiled_loss.py",
             "(target_logits - logsumexp).masked_fill(target_logits < MASKED_BELOW, -math.inf)",
             "target_logits - logsumexp", TILES),
    Mutation("an infinite divergence is left out", "losses/distillation.py",
             "        keep = keep & ~is_infinite\n", "", LOSSES),
    Mutation("a probability beside a mask is 0 or not small", "models/logit_tiles.py",
             "return torch.threshold_(probs, 1.001 * SMALLEST_PROBABILITY, 0.0)", "return probs", LOSSES),
    Mutation("a step without a teacher is refused", "training/guards.py",
             "        if not teacher_finite:\n", "        if False:\n"),
    Mutation("it is counted as a NaN batch", "training/guards.py",
             'NAN_CAUSES = ("forward", "teacher", "gradient")', 'NAN_CAUSES = ("forward", "gradient")'),
    Mutation("the teacher's positions are counted", "training/step.py",
             "not num_expected or dropped < num_teacher", "True"),
    Mutation("a bad teacher leaves the loss scale", "runtime/precision.py",
             'keeps = cause in ("forward", "teacher", "no_targets")', 'keeps = cause in ("forward", "no_targets")',
             ROUTERS),
    Mutation("routers do not learn from a teacher that is not finite", "training/step.py",
             "teacher_finite = teacher_finite and math.isfinite(router_report.router_loss)", "pass", ROUTERS),
    Mutation("an overflow of the routers' gradient is no bad teacher", "training/step.py",
             "if not routers.is_joint and not math.isfinite(norms[1]):", "if False:", ROUTERS),
    Mutation("text that a cache does not hold is no bad teacher", "losses/objective.py",
             "cached is not None and cached.is_missing", "False", STEP),
    Mutation("a teacher that is not finite at the start ends the run", "evaluation/nonfinite.py",
             "    if share > limit:\n", "    if False:\n", MODELS),
    Mutation("a teacher that is finite in most of the text goes on", "teacher/base.py",
             "max_nonfinite = 0.5", "max_nonfinite = 0.0", MODELS),
    Mutation("a student that is not finite at the start ends the run", "training/trainer.py",
             'start.get("val_nonfinite", 0.0), 0.0,', 'start.get("val_nonfinite", 0.0), 1.0,', MODELS),
    Mutation("a student that float16 alone cannot hold ends the run at the start", "evaluation/nonfinite.py",
             "title, nonfinite / total, 0.0,", "title, nonfinite / total, 1.0,", MODELS),
    Mutation("one step with a finite forward is enough to go on", "evaluation/nonfinite.py",
             "        if not count:\n            return\n", "", MODELS),
    Mutation("the share of the teacher that was left out is shown", "reporting/step_lines.py",
             "if dropped > 0 and positions > 0 else 0.0", "if dropped > positions else 0.0", MODELS),
    # what no block can hold
    Mutation("a text is refused of which no block can hold too much", "data/blocks.py",
             "    if share > MAX_SKIPPED_SHARE:\n", "    if False:\n", DATASET),
    Mutation("what no block can hold counts in no perplexity", "data/blocks.py",
             "num_bytes=text.num_bytes - num_bytes,", "num_bytes=text.num_bytes,", DATASET),
    # verdicts
    Mutation("a verdict is obeyed", "training/step.py", "    if verdict.applied:\n", "    if True:\n"),
    Mutation("the norm limit", "training/guards.py", 'return None if grad_norm <= limit else "norm"', "return None"),
    Mutation("the limit follows the norms of the run", "training/guards.py",
             "max(settings.skip_grad_norm, settings.skip_factor * median(self.recent_norms))",
             "settings.skip_grad_norm"),
    Mutation("the limit is finite after five norms", "training/guards.py",
             "if self.applied + self.skipped[\"norm\"] < _NORMS_NEEDED:", "if True:"),
    Mutation("the first five norms have no limit", "training/guards.py",
             "if self.applied + self.skipped[\"norm\"] < _NORMS_NEEDED:", "if not self.recent_norms:", GUARDS),
    Mutation("norms that have risen for good are not refused again", "training/guards.py",
             "if self.refused_norm is None or", "if True or", GUARDS),
    Mutation("the limit stays where norms have risen for good", "training/guards.py",
             "            self.recent_norms = [self.refused_norm]\n", "            pass\n", GUARDS),
    Mutation("the first skip for a norm is shown", "training/guards.py",
             'cause == "norm" and self.skipped["norm"] == 1', "False", GUARDS),
    Mutation("a run without an applied update fails", "training/guards.py",
             "    if guard.applied or not guard.attempts:\n", "    if True:\n", GUARDS),
    Mutation("a finite gradient beyond float32's squares is no overflow", "training/step.py",
             "    if norm == math.inf:", "    if False:", STEP),
    Mutation("it is clipped by its own norm", "training/step.py",
             "        if report.grad_norm > _LARGE_NORM:", "        if False:", STEP),
    Mutation("an overflow always lowers the loss scale", "runtime/precision.py",
             'if cause == "overflow" and self._scaler.get_scale() >= loss_scale:', "if False:", STEP),
    Mutation("emergency after 10 NaN batches", "training/guards.py",
             "emergency = self.consecutive_nan_batches >= self.settings.max_nan_batches", "emergency = False"),
    Mutation("a finite step resets the count of NaN batches", "training/guards.py",
             "            self.consecutive_nan_batches = 0\n", "            pass\n"),
    Mutation("a finite step that is refused resets it too", "training/guards.py",
             "            self.consecutive_nan_batches = 0\n",
             '            self.consecutive_nan_batches *= cause == "norm"\n', GUARDS),
    Mutation("an overflow that a lower loss scale cures is no NaN batch", "training/guards.py",
             'NAN_CAUSES = ("forward", "teacher", "gradient")',
             'NAN_CAUSES = ("forward", "teacher", "gradient", "overflow")'),
    Mutation("an overflow at the floor is a NaN batch", "training/guards.py",
             'NAN_CAUSES = ("forward", "teacher", "gradient")', 'NAN_CAUSES = ("forward", "teacher")'),
    Mutation("frequent NaN batches are reported", "training/guards.py",
             "        self.frequent_nan = True\n        return True",
             "        self.frequent_nan = True\n        return False"),
    Mutation("updates without a gradient are reported", "training/guards.py",
             "return self.consecutive_zero_gradients == _ZERO_GRADIENT_ALARM", "return False"),
    Mutation("a step without targets is no NaN batch", "training/guards.py",
             "        if num_targets == 0:\n", "        if False:\n"),
    Mutation("a micro-batch without targets is passed over", "training/parallel.py",
             "return batch.num_target_tokens > 0", "return True"),
    Mutation("one denominator for the whole step", "training/step.py",
             "precision.backward(total / divisor)",
             "precision.backward(total / max(1, batch.num_target_tokens) / len(micro_batches))"),
    # what follows a NaN batch
    Mutation("the last sound checkpoint stays", "training/recovery.py",
             "return step == self.state[\"sound_step\"] or step < self.state[\"nan_from\"]",
             "return step < self.state[\"nan_from\"]", RECOVERY),
    Mutation("checkpoints from before the first NaN batch stay", "training/recovery.py",
             "return step == self.state[\"sound_step\"] or step < self.state[\"nan_from\"]",
             "return step == self.state[\"sound_step\"]", RECOVERY),
    Mutation("a rewind goes to a sound checkpoint", "training/recovery.py",
             "load(self.sound_checkpoint)", "load(None)", RECOVERY),
    Mutation("no rewind without a sound checkpoint", "training/recovery.py",
             "return self.may_rewind and self.sound_checkpoint is not None", "return self.may_rewind", RECOVERY),
    Mutation("in float16 a validation proves no checkpoint", "training/recovery.py",
             "proves = is_only_evidence or", "proves = True or", RECOVERY),
    Mutation("a loss that grew is a divergence", "training/recovery.py",
             "if has_grown(after, before):", "if False:", RECOVERY),
    Mutation("weights that grew are a divergence", "training/recovery.py",
             "if self._have_grown(norm):", "if False:", RECOVERY),
    Mutation("weights that diverged are never the best", "training/trainer.py",
             "is_best = is_best and not self.recovery.weights_are_lost", "pass", RECOVERY),
    Mutation("nor are weights that one update made useless", "training/recovery.py",
             "return not norm <= _WEIGHT_GROWTH * state[\"proven_norm\"] or", "return", RECOVERY),
    # the loss scale, the norm and the weights
    Mutation("a loss scale", "runtime/precision.py", "enabled=is_float16)", "enabled=False)"),
    Mutation("the floor of the loss scale", "runtime/precision.py",
             "fixed = MIN_LOSS_SCALE if at_floor else", "fixed = None if at_floor else"),
    Mutation("the ceiling of the loss scale", "runtime/precision.py",
             "loss_scale if keeps or at_ceiling else None", "loss_scale if keeps else None"),
    Mutation("a bad forward leaves the loss scale", "runtime/precision.py",
             'keeps = cause in ("forward", "teacher", "no_targets")', 'keeps = cause in ("teacher", "no_targets")'),
    Mutation("update() after every step", "runtime/precision.py", "        self._scaler.update(fixed)", "        pass"),
    Mutation("unscaled before the norm", "training/step.py", "    precision.unscale_(optimizer)\n", ""),
    Mutation("clipping", "training/step.py",
             "        torch.nn.utils.clip_grads_with_norm_(parameters, context.max_grad_norm, grad_norm)\n", ""),
    Mutation("no gradient outlives its step", "training/step.py", "    optimizer.zero_grad(set_to_none=True)\n",
             "    if verdict.applied:\n        optimizer.zero_grad(set_to_none=True)\n"),
    Mutation("the loss scale is kept in a checkpoint", "runtime/precision.py",
             '            self._scaler.load_state_dict(state["scaler"])', "            pass"),
    Mutation("weights that learn are float32", "models/loading.py",
             "precision.dtype if lora.lora_rank else torch.float32", "precision.dtype"),
    Mutation("an adapter is trained in float32", "models/lora.py",
             "autocast_adapter_dtype=True", "autocast_adapter_dtype=False", ADAPTERS),
    Mutation("an adapted layer is kept in range as without its adapter", "models/half_precision.py",
             'getattr(child, "base_layer", child) for child in children', "child for child in children", LORA),
    Mutation("an adapter alone names the base that it was trained on", "preflight/checks.py",
             "if meta.config.lora.adapter_only and made:", "if False:", "tests/commands/test_train_lora.py"),
    Mutation("the optimizer refuses half weights", "training/optimizer.py",
             "    assert all(parameter.dtype is torch.float32 for parameter in trainable)", "    assert True"),
    Mutation("a checkpoint's optimizer state has the shapes of its weights", "training/checkpoint.py",
             "(tuple(tensor.shape), tensor.dtype) != expected[name]", "False", "tests/training/test_optimizer.py"),
    # activations beyond the range of half
    Mutation("the residual stream is float32", "models/half_precision.py",
             "return output.float() if computes_in_float16(output) else output", "return output", RANGE),
    Mutation("gated products are float32", "models/half_precision.py",
             "return _Product.apply(a, b) if a.shape == b.shape else", "return func(a, b) if a.shape == b.shape else",
             RANGE),
    Mutation("rows beyond the range are scaled", "models/half_precision.py",
             "exponent.clamp_(min=0)", "exponent.clamp_(0, 0)", RANGE),
    Mutation("layers that read the residual stream themselves", "models/half_precision.py",
             "return has_linear or any(", 'return (has_linear and not hasattr(module, "self_attn")) or any(', HALF),
    Mutation("experts that are stacked", "models/half_precision.py",
             "parameter.ndim > 2 for", "parameter.ndim > 9 for", RANGE),
    Mutation("scores of eager attention are float32", "models/half_precision.py",
             'if is_eager or not hasattr(module, "is_causal")', 'if not hasattr(module, "is_causal")', RANGE),
    Mutation("those scores are not rounded to half", "models/half_precision.py",
             "if min(a.ndim, b.ndim) > 3:", "if False:", RANGE),
    Mutation("no cast of the residual stream to a weight's dtype", "models/half_precision.py",
             "    if args and _is_half(args[0]):\n        return a\n", "", RANGE),
    Mutation("no cast of a product to half", "models/half_precision.py",
             "torch.float32 if arg is torch.float16 else arg for arg in args)", "arg for arg in args)", RANGE),
    Mutation("norms of a half model are float32", "models/half_precision.py",
             "            _widen_(module)", "            pass", HALF),
    Mutation("norms outside attention return float32", "models/half_precision.py",
             "return (args[0].float(), *args[1:]) if is_half else args", "return args", RANGE),
    Mutation("fused attention reads a residual stream without a norm", "models/half_precision.py",
             "    functional.scaled_dot_product_attention: _attention,\n", "", RANGE),
    Mutation("its projections do too", "models/half_precision.py",
             "    functional.linear: _linear,\n    functional.scaled_dot", "    functional.scaled_dot", RANGE),
    Mutation("the ids of a tokenizer are bounded", "tokenization/backends.py", " > _MAX_ID:", " > 2**40:", FILES),
    Mutation("what a normalizer writes is bounded", "tokenization/backends.py",
             "if len(normalized) > _MAX_GROWTH * len(text):", "if False:", FILES),
    Mutation("a tokenizer that fails is one line", "tokenization/backends.py", "type(error) is not Exception and ", "",
             FILES),
    Mutation("a user-defined piece is text", "tokenization/backends.py",
             "return special - text | {", "return special | {", "tests/tokenization/test_token_table.py"),
    Mutation("the work of a long conversation grows with its length", "data/chat/layout.py",
             "        if user is not None:\n", "        if False:\n", "tests/data/chat/test_layout.py"),
    Mutation("a prepared teacher and student", "models/loading.py",
             "    if precision.dtype is torch.float16:\n        compute_in_range_(model)\n", "", HALF),
    # a cut model
    Mutation("a kept token is kept with those that it is formed from", "tokenization/vocabulary_cut.py",
             'return {index} | {self._model["vocab"][string] for string in formed}', "return {index}", suite=TOKENS),
    Mutation("fewer tokens spell the same texts", "tokenization/vocabulary_cut.py",
             "if before != after:", "if False:", suite=TOKENS),
    Mutation("token ids in the configs follow", "models/cut/token_rows.py",
             "return new.get(value, value) if type(value) is int else value", "return value", suite=ROWS),
    Mutation("a cut of experts is compared with masked routers", "teacher/moe/expert_cut.py",
             "return output.index_fill(-1, self.dropped.to(output.device), -torch.inf)", "return output",
             suite=EXPERTS),
    # the printed metrics
    Mutation("evaluation is not clamped", "evaluation/perplexity.py",
             "target_log_probs(logits.select(batch.positions), batch.targets, tile_size)",
             "target_log_probs(logits.select(batch.positions), batch.targets, tile_size, 5.0)"),
    # the saved student
    Mutation("a weight that a saved dtype cannot hold is refused", "models/saved_weights.py",
             "if overflows.any():", "if False:", suite=HAND_OVER),
    Mutation("no file of a student is rounded before all are checked", "models/saved_weights.py",
             "            require_fits(title, name, weight, dtype)\n    num_zeros", "            pass\n    num_zeros",
             suite=HAND_OVER),
    Mutation("a token is taken out of the hub's error", "runtime/hub.py",
             'return text.replace(token, "***") if token else text', "return text", suite=HAND_OVER),
    Mutation("a GGUF file's logits are compared", "models/gguf/check.py",
             "if not relative_error <= LIMITS[kind]:", "if False:", suite=EXPORT),
    Mutation("a GGUF file's tokens are compared", "models/gguf/check.py",
             "if found != expected:", "if False:", suite=EXPORT),
    Mutation("a server's answer is of the text", "teacher/cache/logprobs.py",
             "if not size:", "if False:", suite=ANSWERS),
    Mutation("a server's probabilities are one distribution", "teacher/cache/logprobs.py",
             "if mass > 1.0 + _TOLERANCE:", "if False:", suite=ANSWERS),
    Mutation("a server's log-probabilities are of this token", "teacher/cache/logprobs.py",
             "if len(places) >= _MIN_SHIFT_TOKENS and", "if False and", suite=SERVED),
    Mutation("a token of the top k has a name of its own", "teacher/cache/logprobs.py",
             "or min(ids) < 0 or", "or", suite=ANSWERS),
    Mutation("the server's model keeps its name", "teacher/cache/served.py",
             "if answers_as != self._answers_as:", "if False:", suite=SERVED),
    Mutation("the same model answers after a lost connection", "teacher/cache/served.py",
             "if self._client.num_lost > lost:", "if False:", suite=SERVED),
    Mutation("a key is not taken along by a redirect", "teacher/cache/server.py",
             "build_opener(_NoRedirects)", "build_opener()", suite=SERVED),
    Mutation("perplexity weighs tokens", "evaluation/perplexity.py",
             "log_probs.double().sum()\n        num_tokens += len(batch.targets)",
             "log_probs.double().mean()\n        num_tokens += 1"),
    Mutation("a perplexity beyond a float is inf", "evaluation/perplexity.py",
             "math.exp(self.loss) if self.loss < 700 else self.loss * math.inf", "math.exp(self.loss)"),
    Mutation("the unclamped loss is reported", "losses/tiled_loss.py",
             "self.unclamped_ce, self.ce = self.unclamped_ce - unclamped.sum(), self.ce - log_probs.sum()",
             "self.unclamped_ce, self.ce = self.unclamped_ce - log_probs.sum(), self.ce - log_probs.sum()"),
    Mutation("the unclamped divergence is reported", "losses/divergence.py",
             "unclamped = _sum((a - b).mul_(weight).sum(dim) for weight, (a, b) in terms)",
             "unclamped = _sum((a - b).mul_(weight).sum(dim) for weight, (a, b) in terms).clamp(max=0.1)"),
)  # fmt: skip


def mutate(package: Path, mutation: Mutation) -> None:
    """Change the one place of the package that a mutation is about."""
    path = package / mutation.module
    source = path.read_text(encoding="utf-8")
    assert source.count(mutation.text) == 1, f"{mutation.module}: {mutation.guard}: its text is not there once"
    path.write_text(source.replace(mutation.text, mutation.changed), encoding="utf-8")


def catching(mutation: Mutation | None, suite: str) -> list[str]:
    """The tests of a suite that fail on a copy of the package with `mutation`."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("sar_kd", "tests"):
            shutil.copytree(ROOT / name, Path(folder) / name, ignore=shutil.ignore_patterns("__pycache__"))
        for path in (ROOT / "pyproject.toml", *ROOT.glob("*.py")):
            shutil.copy(path, folder)
        if mutation:
            mutate(Path(folder) / "sar_kd", mutation)
        command = [sys.executable, "-m", "pytest", "-q", suite, "--tb=no", "-rfE", "-p", "no:cacheprovider"]
        command += ["-m", "not long and not real"]
        environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):
        raise SystemExit(f"pytest ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    names = re.findall(rf"^(?:FAILED|ERROR) {re.escape(suite)}::(\S+)", done.stdout, re.MULTILINE)
    return list(dict.fromkeys(name.removeprefix("test_") for name in names))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", default=[], help="run guards with one of these words, keep the other rows")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "guard_mutations.md")
    options = parser.parse_args()
    words = options.only or [""]
    chosen = [mutation for mutation in MUTATIONS if any(word in mutation.guard for word in words)]
    for suite in dict.fromkeys(mutation.suite for mutation in chosen):
        if failing := catching(None, suite):
            print(f"fails without any mutation: {', '.join(failing)}", file=sys.stderr)
            return 1
    rows = _known(options.output) if options.only else {}
    for mutation in chosen:
        rows[mutation.guard] = row = _row(mutation, catching(mutation, mutation.suite))
        print(row, flush=True)
    table = [rows[mutation.guard] for mutation in MUTATIONS if mutation.guard in rows]
    missed = [row for row in table if "| 0 |" in row]
    verdict = f"{len(table) - len(missed)} of {len(table)} mutations are caught."
    print(verdict)
    text = "# Guards taken away one at a time\n\nMade by `python benchmarks/guard_mutations.py`.\n\n"
    options.output.write_text(text + "\n".join([*HEAD, *table]) + f"\n\n{verdict}\n", encoding="utf-8")
    return 1 if missed else 0


HEAD = ("| guard taken away | module | scenarios that fail | which |", "|---|---|---:|---|")


def _row(mutation: Mutation, caught: list[str]) -> str:
    few = ", ".join(f"`{name}`" for name in caught[:3]) + (", ..." if len(caught) > 3 else "")
    return f"| {mutation.guard} | `{mutation.module}` | {len(caught)} | {few} |"


def _known(path: Path) -> dict[str, str]:
    """The rows that a file has, by guard: `--only` makes the others again and leaves these."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return {line.split(" | ")[0].removeprefix("| "): line for line in lines if line.startswith("| ")}


if __name__ == "__main__":
    sys.exit(main())
