"""What a run does about a step that is not finite: the page that says why, the stop, the rewind, what exits leave."""

import json
import math
import signal
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
import transformers

from sar_kd.commands.main import main as run_command
from sar_kd.commands.main import run as run_as_script
from sar_kd.config.command_line import parse
from sar_kd.config.presets import FP16_SAFE
from sar_kd.data.dataset import build_dataset
from sar_kd.data.files.samples import Document
from sar_kd.errors import TrainingDiverged, UsageError
from sar_kd.evaluation.nonfinite import REMEDIES, remedy_of
from sar_kd.losses.objective import Objective
from sar_kd.models.loading import Models
from sar_kd.reporting.run_log import open_run
from sar_kd.runtime.precision import Precision, setup_precision
from sar_kd.teacher.live import LiveTeacher
from sar_kd.training import trainer as trainer_module
from sar_kd.training.guards import StepGuard
from sar_kd.training.nan_forensics import crash_page, examine
from sar_kd.training.optimizer import build_optimizer, learning_rate_at
from sar_kd.training.recovery import has_grown
from sar_kd.training.step import StepContext
from sar_kd.training.trainer import Datasets, Trainer
from tests.stress.harness import break_on_token, token_of


@pytest.fixture(scope="module")
def texts(corpus_texts):
    """Documents about as long as a block, so that a bad one is a small part of the text."""
    return ["\n".join(corpus_texts[i : i + 2]) for i in range(0, len(corpus_texts), 2)]


@pytest.fixture
def make_trainer(tmp_path, make_run, make_dataset, texts):
    """make_trainer(*flags, dataset=...): a whole run, as the scripts make it, over in-memory models."""

    def make(*flags, folder=None, steps=12, documents=None):
        argv = ["--output_dir", str(folder or tmp_path / "run"), "--train_steps", str(steps), "--eval_steps", "1000"]
        argv += ["--save_steps", "2", "--per_device_batch_size", "2", "--student_lr", "1e-3", "--device", "cpu"]
        config = parse(FP16_SAFE, [*argv, *map(str, flags)])
        parts, pair = make_run(), make_dataset().pair
        named = documents or [Document(f"doc{number}", text) for number, text in enumerate(texts)]
        train = build_dataset(named, pair, 24, 60)
        # Of words of the text in another order, so that no block is one of those that a test breaks.
        words = [word for text in texts[:6] for word in text.split()][::-1]
        validation = build_dataset([Document("held out", " ".join(words))], pair, 24, 60)
        log, precision = open_run(config), setup_precision(config.precision, config.train.seed)
        models = Models(parts.teacher, parts.student, pair, False)
        objective = Objective(models.teacher, models.student, config.loss, train.aligner, precision)
        optimizer = build_optimizer(models.student, config.optim, objective.parameters())
        context = StepContext(objective, optimizer, StepGuard(config.guards), precision, config.guards.max_grad_norm)
        teacher = LiveTeacher(config, objective, train.aligner)
        return Trainer(config, models, Datasets(train, validation), context, log, teacher)

    return make


def _json(path):
    return json.loads(path.read_text())


def _metrics(folder, event):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["event"] == event]


def _student_is_finite(folder) -> bool:
    student = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return all(bool(parameter.isfinite().all()) for parameter in student.parameters())


def _rare_token(trainer, blocks) -> int:
    """A token of the given blocks that stands in no other."""
    own = set.intersection(*(set(trainer.train.batch([b]).student.input_ids[0].tolist()) for b in blocks))
    for block in set(range(len(trainer.train))) - set(blocks):
        own -= set(trainer.train.batch([block]).student.input_ids[0].tolist())
    return min(own)


# The page


@pytest.fixture
def stopped(make_trainer, tmp_path, capsys):
    """A run whose second layer norm is followed by a product that float16 cannot hold, in one document only."""
    trainer = make_trainer(steps=40)
    weight = trainer.models.student.model.layers[0].mlp.down_proj.weight.data
    trainer._check_first_steps = lambda: weight.mul_(1e8)  # after the check, which would refuse the run
    with pytest.raises(TrainingDiverged) as error:
        trainer.run()
    return SimpleNamespace(folder=tmp_path / "run", line=str(error.value), out=capsys.readouterr().out)


def test_the_page_names_module_dtype_reach_documents_and_remedy(stopped):
    text, crash = (stopped.folder / "crash" / "crash.md").read_text(), _json(stopped.folder / "crash" / "crash.json")
    assert text.startswith("# Step 10: the forward is not finite")
    assert "stopped after 10 NaN batches in a row" in text
    assert "`model.layers.0.mlp.down_proj` (Linear)" in text
    assert "float16 ends at 65504" in text
    assert "--model_dtype float32" in text
    assert all(f"- {name}" in text for name in crash["documents"])
    assert crash["first_bad_module"]["largest_output_float32"] > 65504
    assert (crash["verdict"], crash["finite_in_float32"]) == ("fp16 range", True)
    assert max(len(line) for line in text.splitlines()) < 200


def test_the_stop_names_the_page_and_the_command_prints_it(stopped, capsys):
    assert "crash.md" in stopped.line
    assert run_command(["forensics", str(stopped.folder)]) == 0
    assert capsys.readouterr().out == (stopped.folder / "crash" / "crash.md").read_text()


def test_the_first_bad_step_is_explained_while_the_run_goes_on(make_trainer, tmp_path):
    trainer = make_trainer()
    bad = trainer.train.micro_batches(3, 2, 1, 0)[0].blocks[0]
    _break_blocks(trainer, [bad])
    summary = trainer.run()
    assert (summary["status"], summary["skipped"]["forward"], summary["applied"]) == ("finished", 1, 11)
    crash = _json(tmp_path / "run" / "crash" / "crash.json")
    assert (crash["step"], crash["bad_blocks"]) == (4, [bad])
    assert crash["documents"] == trainer.train.documents_of(bad)
    assert "the run went on" in (tmp_path / "run" / "crash" / "crash.md").read_text()


def test_nothing_is_replayed_and_nothing_written_while_nothing_is_wrong(make_trainer, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sar_kd.training.recovery.examine", lambda *_: pytest.fail("replayed without a cause"))
    trainer = make_trainer("--init_loss_scale", 2**24)  # with overflows, which are calibration
    summary = trainer.run()
    assert summary["skipped"]["overflow"] > 0
    assert not (tmp_path / "run" / "crash").exists()
    assert run_command(["forensics", str(tmp_path / "run")]) == 0
    assert "No step of this run had a NaN" in capsys.readouterr().out


def test_an_applied_step_of_a_run_reads_the_device_once_its_logging_and_callbacks_included(make_trainer, monkeypatch):
    trainer, reads = make_trainer(), []
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda position_ids: None)
    step, log_step, run_callbacks = trainer._step, trainer._log_step, trainer._run_step_callbacks

    def counted(method, name):
        return lambda self, *args, **kwargs: (reads.append(name), method(self, *args, **kwargs))[1]

    def watched():
        with monkeypatch.context() as patch:
            for name in ("tolist", "item", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__"):
                patch.setattr(torch.Tensor, name, counted(getattr(torch.Tensor, name), name))
            trainer.train.micro_batches = lambda *_: batches
            report, micro_batches = step()
            log_step(report)
            run_callbacks(report, micro_batches)
        return report, micro_batches

    batches = trainer.train.micro_batches(0, 2, 1, 0)  # the collator's reads are of the host's own tensors
    monkeypatch.setattr(trainer, "_step", watched)
    monkeypatch.setattr(trainer, "_log_step", lambda report: None)
    monkeypatch.setattr(trainer, "_run_step_callbacks", lambda *_: None)
    assert trainer.run()["applied"] == 12
    assert reads == ["tolist"] * 12


@pytest.mark.parametrize("argv", [[], ["a", "b"], ["--jsn"], ["nowhere"]])
def test_the_command_names_in_one_line_what_is_missing(argv, capsys):
    assert run_command(["forensics", *argv]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_weight_too_large_for_half_is_distinguished_from_a_product(make_run):
    run = make_run()
    run.student.lm_head.weight.data[3, 3] = 1e5
    found = examine(run.student, *run.batches([0]), run.precision)
    assert found["first_bad_module"]["largest_weight"] == pytest.approx(1e5)
    record = {"step": 1, "cause": "forward", "outcome": "", "documents": ["a"], "loss_scale": 1.0, **found}
    text = crash_page(record | dict.fromkeys(("loss", "ce_loss", "kd_loss", "grad_norm"), math.nan))
    assert "A weight of it is 1e+05; float16 ends at 65504." in text


def test_a_weight_that_is_not_finite_is_named_as_such(make_run):
    run = make_run()
    run.student.lm_head.weight.data[3, 3] = math.nan
    found = examine(run.student, *run.batches([0]), run.precision)
    assert (found["verdict"], found["finite_in_float32"]) == ("weights", False)


def test_an_input_that_no_precision_can_read_is_weights_or_data(make_run):
    run = make_run()
    break_on_token(run.student, token_of(run, 0, 1), math.inf)
    (batch,) = run.batches([1, 0])
    found = examine(run.student, batch, run.precision)
    assert (found["verdict"], found["bad_blocks"]) == ("weights or data", [0])


def test_a_gradient_that_is_not_finite_is_traced_to_its_module(make_run):
    run = make_run()

    class Exploding(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * math.inf

    layer = run.student.model.layers[0]
    layer.mlp.gate_proj.register_forward_hook(lambda module, inputs, output: Exploding.apply(output))
    (batch,) = run.batches([0])
    found = examine(run.student, batch, run.precision, "gradient", lambda b: run.objective(b).total)
    assert found["verdict"] == "gradient"
    assert found["first_bad_module"]["name"] == "model.layers.0.mlp.gate_proj"
    assert all(parameter.grad is None for parameter in run.student.parameters())


def test_a_loss_that_is_infinite_over_finite_logits_is_named_as_the_loss(make_run):
    run = make_run(loss={"loss_clamp_style": "off"})
    run.objective.alpha_ce = 1e38  # more than the command line takes
    (batch,) = run.batches([0, 1])
    found = examine(run.student, batch, run.precision, "forward", lambda b: run.objective(b).total)
    assert (found["verdict"], "--alpha_ce" in found["remedy"]) == ("loss", True)


def test_a_nan_that_the_replay_does_not_reproduce_is_reported_as_such(make_run):
    run = make_run()
    (batch,) = run.batches([0])
    found = examine(run.student, batch, run.precision, "forward", lambda b: run.objective(b).total)
    assert (found["verdict"], found["first_bad_module"]) == ("not reproduced", None)


# Divergence by a learning rate that is too high


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_rate_that_is_too_high_is_named_as_the_cause_with_its_value(make_trainer, tmp_path, dtype):
    trainer = make_trainer("--student_lr", 1e4, "--model_dtype", dtype, "--warmup_steps", 0, steps=40)
    trainer.models.teacher.to(trainer.context.precision.dtype)
    with pytest.raises(TrainingDiverged, match="lower --student_lr"):
        trainer.run()
    crash = _json(tmp_path / "run" / "crash" / "crash.json")
    assert crash["verdict"] == "diverged"
    assert "--student_lr (it is 10000)" in crash["remedy"]
    assert "float32" not in crash["remedy"]
    assert "--max_grad_norm" not in crash["remedy"]  # 0.5 is in force
    text = (tmp_path / "run" / "crash" / "crash.md").read_text()
    assert "grew" in crash["growth"] or "grow:" in crash["growth"]
    assert crash["growth"] in text


def test_after_a_rewind_the_rate_is_named_as_it_was_given(make_trainer):
    trainer = make_trainer("--student_lr", 1e30, "--model_dtype", "float32", "--warmup_steps", 0, steps=20)
    trainer.models.teacher.float()
    trainer.recovery.state["lr_scale"] = 0.5
    with pytest.raises(TrainingDiverged, match=r"--student_lr \(it is 1e\+30, and half of that since the rewind\)"):
        trainer.run()


@pytest.mark.parametrize("eval_steps", [1, 3])  # 1: validated before the first NaN batch
def test_weights_without_a_gradient_are_not_called_good_nor_saved_as_the_best(make_trainer, tmp_path, eval_steps):
    flags = "--student_lr", 1e30, "--model_dtype", "float32", "--warmup_steps", 0, "--eval_steps", eval_steps
    trainer = make_trainer(*flags, steps=20)
    trainer.models.teacher.float()
    with pytest.raises(TrainingDiverged, match="lower --student_lr"):
        trainer.run()
    summary = _json(tmp_path / "run" / "summary.json")
    assert summary["val_bits_per_byte_final"] < summary["val_bits_per_byte_start"]  # uniform predictions
    assert summary["best_step"] == 0
    student = safetensors.torch.load_file(tmp_path / "run" / "student" / "model.safetensors")
    assert max(weight.abs().max() for weight in student.values()) < 10
    assert "Its last weights are not good" in (tmp_path / "run" / "crash" / "crash.md").read_text()


def test_a_clip_that_is_hardly_one_is_named_with_its_value(make_run):
    precision = make_run().precision
    assert "--max_grad_norm 1 (it is 50)" in remedy_of("diverged", precision, "1", 50.0)
    assert "--max_grad_norm" not in remedy_of("diverged", precision, "1", 1.0)


@pytest.mark.parametrize("verdict", REMEDIES)
def test_a_run_in_float32_is_never_advised_to_compute_in_float32(verdict):
    precision = Precision(torch.device("cpu"), torch.float32, 1.0)
    assert verdict == "fp16 range" or "--model_dtype float32" not in remedy_of(verdict, precision, "0.001")


def test_documents_that_are_not_finite_are_no_divergence(make_trainer, tmp_path):
    trainer = make_trainer(steps=24)
    _break_blocks(trainer, [blocks[0] for blocks in _steps_blocks(trainer, range(5, 15))])
    with pytest.raises(TrainingDiverged):
        trainer.run()
    crash = _json(tmp_path / "run" / "crash" / "crash.json")
    assert (crash["verdict"], crash["growth"]) == ("weights or data", "")


def test_a_loss_that_grew_is_a_divergence_although_the_weights_did_not_grow(make_trainer, tmp_path):
    trainer = make_trainer(steps=24)
    trainer.recovery.state["losses"] = [0.5] * 50  # nats per token; the student's are about 6
    _break_blocks(trainer, [blocks[0] for blocks in _steps_blocks(trainer, range(5, 15))])
    with pytest.raises(TrainingDiverged, match="lower --student_lr"):
        trainer.run()
    crash = _json(tmp_path / "run" / "crash" / "crash.json")
    assert crash["verdict"] == "diverged"
    assert crash["growth"].startswith("The loss grew from 0.5 to ")


@pytest.mark.parametrize(
    ("loss", "usual", "grown"),
    [(77883.0, 4.39, True), (10.8, 4.39, True), (6.2, 4.39, False), (2.5, 1.0, False), (3.1, 1.0, True),
     (math.nan, 4.39, False), (4.39, math.nan, False), (math.inf, 4.39, True)],
)  # fmt: skip
def test_a_loss_has_grown_if_it_is_half_as_high_again_and_two_nats_higher(loss, usual, grown):
    assert has_grown(loss, usual) == grown


# Checkpoints that stay


def _spoil_weights_at(trainer, step):
    """The update of this step gives weights whose forward is not finite in float16."""

    def spoil(*_):
        if trainer.state.step + 1 == step:
            trainer.models.student.model.layers[0].mlp.down_proj.weight.data.mul_(1e9)

    trainer.context.optimizer.register_step_post_hook(spoil)


def _checkpoints(folder) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (folder / "checkpoint").glob("step-*"))


def test_the_last_sound_checkpoint_is_not_rotated_away(make_trainer, tmp_path):
    trainer = make_trainer("--keep_checkpoints", 2, steps=60)
    _spoil_weights_at(trainer, 7)
    with pytest.raises(TrainingDiverged):
        trainer.run()
    assert trainer.state.step == 17
    assert _checkpoints(tmp_path / "run") == [4, 6, 16, 17]
    saved = safetensors.torch.load_file(tmp_path / "run" / "checkpoint" / "step-00000006" / "student.safetensors")
    assert saved["model.layers.0.mlp.down_proj.weight"].abs().max() < 65504
    page = (tmp_path / "run" / "crash" / "crash.md").read_text()
    assert "`checkpoint/step-00000006` is the last one after which a step or a validation was finite" in page


def test_a_sound_checkpoint_goes_when_a_newer_one_is_sound(make_trainer, tmp_path):
    make_trainer("--keep_checkpoints", 1, steps=12).run()
    assert _checkpoints(tmp_path / "run") == [12]


def test_a_checkpoint_is_sound_after_a_finite_validation(make_trainer):
    trainer = make_trainer("--eval_steps", 4, "--model_dtype", "float32", steps=8)
    trainer.models.teacher.float()
    sound = []
    save = trainer._save
    trainer._save = lambda: (save(), sound.append((trainer.state.step, trainer.recovery.state["sound_step"])))
    trainer.run()
    assert sound == [(2, -1), (4, 4), (6, 4), (8, 8)]


def test_in_float16_a_validation_does_not_stand_for_a_step_that_follows(make_trainer, tmp_path):
    trainer = make_trainer("--eval_steps", 2, "--keep_checkpoints", 1, steps=60)
    _spoil_weights_at(trainer, 8)  # the validation of step 8 is in float32, and finite
    with pytest.raises(TrainingDiverged):
        trainer.run()
    assert _checkpoints(tmp_path / "run") == [6, 8, 18]
    assert trainer.recovery.state["sound_step"] == 6


def test_a_rewind_goes_to_the_last_sound_checkpoint_although_newer_ones_were_saved(make_trainer, tmp_path):
    trainer = make_trainer("--on_divergence", "rewind", "--keep_checkpoints", 1, steps=24)
    _spoil_weights_at(trainer, 7)
    rewind = trainer._rewind

    def spoil_once(report):
        rewind(report)
        trainer.context.optimizer._optimizer_step_post_hooks.clear()

    trainer._rewind = spoil_once
    assert trainer.run()["status"] == "finished"
    (record,) = _metrics(tmp_path / "run", "rewind")
    assert (record["step"], record["rewound_from"]) == (6, 17)
    assert _checkpoints(tmp_path / "run") == [24]


@pytest.mark.slow
def test_a_stopped_run_can_be_resumed_with_a_rewind_to_its_last_sound_checkpoint(make_trainer, tmp_path):
    trainer = make_trainer(steps=24)
    _spoil_weights_at(trainer, 7)
    with pytest.raises(TrainingDiverged):
        trainer.run()
    assert make_trainer("--resume", "--on_divergence", "rewind", steps=24).run()["status"] == "finished"
    (record,) = _metrics(tmp_path / "run", "rewind")
    assert record["step"] == 6


def test_a_run_without_a_sound_checkpoint_is_not_rewound(make_trainer, tmp_path):
    trainer = make_trainer(steps=24)
    _spoil_weights_at(trainer, 1)
    with pytest.raises(TrainingDiverged):
        trainer.run()
    with pytest.raises(TrainingDiverged, match="emergency stop after 11 consecutive"):
        make_trainer("--resume", "--on_divergence", "rewind", steps=24).run()
    assert _metrics(tmp_path / "run", "rewind") == []
    assert _json(tmp_path / "run" / "summary.json")["rewound_from"] == 0
    assert "--resume --on_divergence rewind" not in (tmp_path / "run" / "crash" / "crash.md").read_text()


def test_a_run_without_an_applied_update_is_no_success(make_trainer, tmp_path):
    trainer = make_trainer("--skip_rule", "fixed", "--skip_grad_norm", 1e-9)
    with pytest.raises(TrainingDiverged, match=r"no update was applied \(12 of 12 steps .* --skip_rule adaptive"):
        trainer.run()
    summary = _json(tmp_path / "run" / "summary.json")
    assert (summary["status"], summary["applied"], summary["skipped"]["norm"]) == ("emergency_stop", 0, 12)


def test_the_first_skip_for_a_norm_is_shown_and_all_are_counted_in_words_at_the_end(make_trainer, capsys):
    trainer = make_trainer("--skip_rule", "fixed")
    scale = [1.0]
    for parameter in trainer.models.student.parameters():
        parameter.register_hook(lambda gradient: gradient * scale[0])
    trainer.context.optimizer.register_step_post_hook(lambda *_: scale.__setitem__(0, 1e3))
    trainer.run()
    lines = capsys.readouterr().out.splitlines()
    assert sum("skipped (norm), its gradient norm" in line for line in lines) == 1
    assert "11 of 12 steps were skipped: 11 for a gradient norm above the limit" in lines


# The rewind


@pytest.fixture
def spoiled(make_trainer, tmp_path, capsys):
    """make(*flags): a run in which every block of two documents is not finite from step 5 on, ten times in a row."""

    def make(*flags, steps=24):
        trainer = make_trainer(*flags, steps=steps)
        state = SimpleNamespace(trainer=trainer, folder=tmp_path / "run", bad=None, seen=[])
        train_step = trainer_module.train_step

        def watched(micro_batches, context):
            state.seen.append([block for batch in micro_batches for block in batch.blocks])
            return train_step(micro_batches, context)

        state.step = watched
        return state

    return make


def _break_blocks(trainer, blocks):
    """Reading the first tokens of one of these blocks gives an embedding of inf."""
    heads = {tuple(trainer.train.batch([b]).student.input_ids[0, :12].tolist()) for b in blocks}

    def hook(module, inputs, output):
        rows = [tuple(row[:12].tolist()) in heads for row in inputs[0]]
        return output.masked_fill(torch.tensor(rows)[:, None, None], math.inf)

    return trainer.models.student.get_input_embeddings().register_forward_hook(hook)


def _steps_blocks(trainer, steps):
    return [trainer.train.micro_batches(step, 2, 1, 0)[0].blocks for step in steps]


def test_a_rewound_run_goes_back_once_at_half_the_rate_without_the_bad_documents(spoiled, monkeypatch):
    run = spoiled("--on_divergence", "rewind")
    bad = [blocks[0] for blocks in _steps_blocks(run.trainer, range(5, 15))]
    _break_blocks(run.trainer, bad)
    monkeypatch.setattr(trainer_module, "train_step", run.step)
    summary = run.trainer.run()
    assert (summary["status"], summary["steps"], summary["rewound_from"]) == ("finished", 24, 15)
    (rewind,) = _metrics(run.folder, "rewind")
    assert (rewind["step"], rewind["rewound_from"]) == (4, 15)  # those of steps 6 to 14 were never seen to be sound
    assert set(bad) <= set(rewind["skipped_blocks"])
    assert not set(rewind["skipped_blocks"]).intersection(*run.seen[15:])
    assert not any(set(rewind["skipped_blocks"]) & set(blocks) for blocks in run.seen[15:])
    rates = {record["step"]: record["learning_rate"] for record in _metrics(run.folder, "step")}
    assert sorted(rates) == list(range(1, 25))
    optim = run.trainer.config.optim
    assert rates[4] == learning_rate_at(3, 24, optim, optim.student_lr)
    assert rates[5] == 0.5 * learning_rate_at(4, 24, optim, optim.student_lr)
    assert "went back to its last sound checkpoint" in (run.folder / "crash" / "crash.md").read_text()
    assert _student_is_finite(run.folder / "student")


def test_a_second_divergence_stops_the_run(spoiled):
    run = spoiled("--on_divergence", "rewind", steps=60)
    run.trainer._check_first_steps = lambda: None  # would refuse this run
    run.trainer.models.student.lm_head.register_forward_hook(
        lambda module, inputs, output: output * math.inf if module.training else output
    )
    with pytest.raises(TrainingDiverged):
        run.trainer.run()
    summary = _json(run.folder / "summary.json")
    assert (summary["status"], summary["rewound_from"]) == ("emergency_stop", 10)
    assert len(_metrics(run.folder, "rewind")) == 1
    text = (run.folder / "crash" / "crash.md").read_text()
    assert "is the last one after which" in text
    assert "--resume --on_divergence rewind" not in text  # it has gone back already


def test_a_rewind_puts_back_every_bit(spoiled, monkeypatch):
    run = spoiled("--on_divergence", "rewind", "--save_steps", 100, steps=20)
    before = [parameter.detach().clone() for parameter in run.trainer.models.student.parameters()]
    _break_blocks(run.trainer, [blocks[0] for blocks in _steps_blocks(run.trainer, range(5, 15))])
    rewind = Trainer._rewind
    after = []

    def watched(self, report):
        rewind(self, report)
        after.extend(parameter.detach().clone() for parameter in self.models.student.parameters())
        assert self.state.step == 0
        assert self.context.guard.attempts == 0
        assert not self.context.optimizer.state

    monkeypatch.setattr(Trainer, "_rewind", watched)
    run.trainer.run()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.slow
def test_a_run_interrupted_after_its_rewind_does_not_go_back_again(spoiled, make_trainer, monkeypatch):
    flags = ("--on_divergence", "rewind")
    run = spoiled(*flags)
    bad = [blocks[0] for blocks in _steps_blocks(run.trainer, range(5, 15))]
    _break_blocks(run.trainer, bad)

    def interrupting(*args):
        if len(run.seen) == 16:
            signal.raise_signal(signal.SIGINT)
        return run.step(*args)

    monkeypatch.setattr(trainer_module, "train_step", interrupting)
    assert run.trainer.run()["status"] == "interrupted"
    monkeypatch.undo()
    resumed = make_trainer(*flags, "--resume")
    _break_blocks(resumed, bad)
    summary = resumed.run()
    assert (summary["status"], summary["rewound_from"], resumed.recovery.state["lr_scale"]) == ("finished", 15, 0.5)
    assert set(bad) <= set(resumed.recovery.state["skipped_blocks"])


@pytest.mark.slow
def test_of_one_long_document_only_the_bad_blocks_are_skipped(make_trainer, texts):
    trainer = make_trainer("--on_divergence", "rewind", documents=[Document("all", "\n".join(texts))], steps=24)
    bad = {blocks[0] for blocks in _steps_blocks(trainer, range(5, 15))}
    _break_blocks(trainer, bad)
    trainer.run()
    assert set(trainer.recovery.state["skipped_blocks"]) == bad


def test_a_block_that_is_skipped_is_replaced_by_the_next_that_is_not(make_trainer):
    trainer = make_trainer()
    last = len(trainer.train) - 1

    def replaced(skipped):
        trainer.recovery.state["skipped_blocks"] = list(skipped)
        return trainer.recovery.replace_skipped([3, last, 5])

    assert replaced([]) == [3, last, 5]
    assert replaced([3, 4, last]) == [5, 0, 5]
    assert replaced(range(last + 1)) == [3, last, 5]


# What every exit leaves


def test_a_failure_that_has_nothing_to_do_with_the_weights_leaves_them(make_trainer, tmp_path, monkeypatch):
    trainer, train_step, calls = make_trainer("--save_steps", 100), trainer_module.train_step, []

    def failing(*args):
        calls.append(1)
        if len(calls) == 8:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return train_step(*args)

    monkeypatch.setattr(trainer_module, "train_step", failing)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        trainer.run()
    folder = tmp_path / "run"
    saved = safetensors.torch.load_file(folder / "checkpoint" / "step-00000007" / "student.safetensors")
    assert torch.equal(saved["lm_head.weight"], trainer.models.student.lm_head.weight)
    assert _student_is_finite(folder / "student")
    monkeypatch.undo()
    assert make_trainer("--save_steps", 100, "--resume").run()["steps"] == 12


@pytest.mark.parametrize("divergence", ["stop", "rewind"])
def test_a_stopped_run_leaves_a_finite_student_and_checkpoint(make_trainer, tmp_path, divergence):
    trainer = make_trainer("--on_divergence", divergence, steps=60)
    bad = [False]
    trainer.models.student.lm_head.register_forward_hook(
        lambda module, inputs, output: output * math.inf if bad[0] and module.training else output
    )
    trainer.context.optimizer.register_step_post_hook(lambda *_: bad.__setitem__(0, trainer.state.step >= 4))
    with pytest.raises(TrainingDiverged):
        trainer.run()
    folder = tmp_path / "run"
    assert _student_is_finite(folder / "student")
    latest = folder / "checkpoint" / (folder / "checkpoint" / "latest").read_text()
    saved = safetensors.torch.load_file(latest / "student.safetensors")
    assert all(bool(tensor.isfinite().all()) for tensor in saved.values())
    assert torch.equal(saved["lm_head.weight"], trainer.models.student.lm_head.weight)


@pytest.mark.slow
def test_exit_codes_are_0_2_3_and_130(make_trainer, monkeypatch, capsys):
    def interrupted(argv):
        trainer = make_trainer("--overwrite")
        monkeypatch.setattr(trainer_module, "train_step", _signalling(trainer_module.train_step))
        return trainer.run()

    def diverged(argv):
        trainer = make_trainer("--overwrite")
        trainer._check_first_steps = lambda: None  # would refuse this run
        trainer.models.student.lm_head.register_forward_hook(
            lambda module, inputs, output: output * math.nan if module.training else output
        )
        return trainer.run()

    def full(argv):
        raise UsageError("--output_dir run: no room")

    assert run_as_script(lambda argv: make_trainer().run()) == 0
    assert run_as_script(full) == 2
    assert run_as_script(diverged) == 3
    assert run_as_script(interrupted) == 130


def _signalling(train_step):
    def step(*args):
        signal.raise_signal(signal.SIGTERM)
        return train_step(*args)

    return step
