"""The teacher's routing over a whole run: which one, what it is worth, when to be alarmed, what is kept of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sar_kd.config.runs import Config, RoutingConfig
from sar_kd.data.dataset import Dataset
from sar_kd.errors import UsageError
from sar_kd.evaluation.perplexity import Evaluation, evaluate, shard_batches
from sar_kd.losses.objective import Objective
from sar_kd.models.lm_head import LMHeads
from sar_kd.models.loading import Models
from sar_kd.models.memory_saving import recompute_activations_
from sar_kd.runtime.distributed import SINGLE_PROCESS, ProcessGroup
from sar_kd.runtime.precision import Precision
from sar_kd.teacher.moe.discovery import describe_routers, find_routers, require_routers, router_parameters
from sar_kd.teacher.moe.router_checkpoint import FILE, save_router_update
from sar_kd.teacher.moe.router_metrics import Shares, alarms_of, figures_of
from sar_kd.teacher.moe.router_training import FROZEN_ROUTERS, FrozenRouters, RouterTrainer
from sar_kd.teacher.moe.routing_hooks import Routing, verify

LARGEST_LOSS = 0.05
"""A routing in which the teacher's perplexity is worse by a larger share than this is not chosen unasked."""


class LiveTeacher:
    """How the teacher routes in a run, and what becomes of its routers. Use as a context around the run."""

    def __init__(
        self,
        word: str,
        routing: Routing,
        learner: FrozenRouters,
        lines: list[str],
        config: Config,
        models: Models,
        process_group: ProcessGroup = SINGLE_PROCESS,
        heads: LMHeads | None = None,
    ):
        """word: 'native', 'all', 'ka' or 'sar'; lines: what to say at the start; heads: of models tried already"""
        self.word, self.routing, self.lines = word, routing, lines
        self.learner: Any = learner  # what a RouterLearner has beyond FrozenRouters is asked of one that learns only
        self._config, self._models, self._process_group, self._heads = config, models, process_group, heads
        self.passes = config.routing.ka_passes if word == "ka" else 1
        """Steps in a row on the same text"""
        self.start: dict = {}
        self.last: dict = {}
        self.alarms: list[str] = []
        self.stopped_at: int | None = None

    def __enter__(self) -> LiveTeacher:
        self.routing.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        self.routing.__exit__(*exception)

    def learner_at(self, step: int, rate_at: Callable[[float], float]) -> FrozenRouters:
        """The routers of attempt `step`; they stand still once stopped.

        rate_at: the learning rate of this attempt for a given peak
        """
        if self.stopped_at is not None or not isinstance(self.learner, RouterTrainer):
            return FROZEN_ROUTERS
        config = self._config
        self.learner.set_learning_rate_(rate_at(config.routing.router_lr))
        self.learner.measures = (step + 1) % config.train.log_steps == 0
        return self.learner

    def begin(self, validation: Dataset, precision: Precision) -> list[str]:
        """Measure the teacher before the first step, choose the experts of `--sar_routing auto`; lines to show.

        Every expert active is what no mixture of experts was trained for, and some are useless that way.
        """
        self.start = self.last = self.measure(validation, precision)
        if self.word == "native":
            return []
        native, routed = (self.start[f"teacher_val_ppl_{how}"] for how in ("native", "routed"))
        if self.routing.rule == "native":
            return [f"Teacher's perplexity: {native:.2f} in its own routing, in which its routers learn"]
        active = "every expert active" if self.routing.rule == "all" else "every expert but one"
        line = f"Teacher's perplexity: {native:.2f} in its own routing, {routed:.2f} with {active}"
        if routed <= (1 + LARGEST_LOSS) * native:
            return [line]
        line += f", which is more than {LARGEST_LOSS:.0%} worse"
        chooses = self.word == "sar" and self._config.routing.sar_routing == "auto"
        if not chooses or not all(spec.has_native_gradient for spec in self.routing.specs):
            return [line + ": the student learns from a weaker teacher; --routing native uses it as it is"]
        self.routing.use("native")
        self.start = self.last = self.measure(validation, precision)
        return [line + ": the routers learn in its own routing instead (--sar_routing all keeps every expert active)"]

    def figures(self) -> dict:
        """The teacher as it was before the first step, in its own routing."""
        return {name: self.start[f"teacher_{name}_native"] for name in ("val_ppl", "val_bits_per_byte")}

    def measure(self, validation: Dataset, precision: Precision) -> dict:
        """The teacher on held-out text in its own routing and in the run's, and its routers' entropy and usage."""
        with self.routing.using("native"):
            native, found = self._evaluate(validation, precision)
        if self.word == "native":
            return figures_of(native, "native")
        if self.routing.rule == "native":
            routed, own = native, found
        else:
            with self.routing.same_draws():
                routed, own = self._evaluate(validation, precision)
        return figures_of(native, "native") | figures_of(routed, "routed") | own

    def _evaluate(self, validation: Dataset, precision: Precision) -> tuple[Evaluation, dict]:
        shares, process_group = Shares(self.routing, self._process_group), self._process_group
        batches = shard_batches(
            validation.token_batches("teacher", self._config.train.per_device_batch_size), process_group
        )
        what = self._models.teacher, shares.watch(batches), validation.text.num_bytes, precision, process_group
        read = evaluate(*what, heads=self._heads, workspace_mb=self._config.loss.loss_workspace_mb)
        return read, shares.figures()

    def watch(self, step: int, validation: Dataset, precision: Precision) -> tuple[dict, list[str]]:
        """Measure routers that learn; the figures, and lines about what is alarming for the first time."""
        if not self.learner.learns:
            return {}, []
        self.last = self.measure(validation, precision) | {"router_change": self.learner.changes()}
        news = [alarm for alarm in alarms_of(self.start, self.last) if alarm[0] not in self.alarms]
        self.alarms += [name for name, _ in news]
        lines = [f"Step {step}: alarm, {line}" for _, line in news]
        if news and self._config.routing.router_stop_on_drift and self.stopped_at is None:
            self.stopped_at = step
            lines.append(f"Step {step}: the routers stop learning (--router_stop_on_drift); the student goes on")
        elif news:
            lines.append("The routers go on learning; --router_stop_on_drift stops them at an alarm")
        return self.last, lines

    def save(self, folder: Path, step: int) -> None:
        """Prove the frozen part unchanged, then write `router_update.safetensors`; nothing where no router learns."""
        if not self.learner.learns:
            return
        self.learner.check_frozen()
        self._process_group.on_rank_zero(lambda: self._write(folder, step))

    def _write(self, folder: Path, step: int) -> None:
        routing, teacher = self._config.routing, self._models.teacher
        about = {
            "base_model": self._config.models.teacher_model,
            "architecture": type(teacher).__name__,
            "dtype": str(next(teacher.parameters()).dtype).removeprefix("torch."),
            "frozen_sha256": self.learner.frozen_sha256,
            "initial_sha256": self.learner.initial_sha256,
            "step": step,
            "routers": describe_routers(self.routing.specs),
            "sar_routing": self.routing.rule,
            "sar_schedule": routing.sar_schedule,
        }
        save_router_update(folder / FILE, self.learner.parameters, about)

    def summary(self) -> dict:
        """For `summary.json`."""
        found: dict = {"routing": self.word, "experts": self.routing.rule, "router_start": self.start}
        if self.learner.learns:
            found |= {"router_final": self.last, "router_alarms": self.alarms, "router_stopped_at": self.stopped_at}
            found["frozen_sha256"] = self.learner.frozen_sha256
        return found

    def state_dict(self) -> dict:
        """Routers, their optimizer, the draws, and what was measured."""
        learned = self.learner.state_dict() if self.learner.learns else {}
        told = {"start": self.start, "last": self.last, "alarms": self.alarms, "stopped_at": self.stopped_at}
        draws, *others = self._process_group.all_gather_object(self.routing.state_dict())
        return {"routing": draws, "others": others, "rule": self.routing.rule, "learner": learned, **told}

    def load_state_dict(self, state: dict) -> None:
        """Put it back.

        Raises: ValueError if the teacher is not the one that the state was made with
        """
        if self.learner.learns:
            self.learner.load_state_dict(state["learner"])
        self.routing.load_state_dict([state["routing"], *state["others"]][self._process_group.rank])
        self.routing.use(state["rule"])
        self.start, self.last = state["start"], state["last"]
        self.alarms, self.stopped_at = list(state["alarms"]), state["stopped_at"]


def build_teacher_routing(
    config: Config, models: Models, objective: Objective, train: Dataset, process_group: ProcessGroup = SINGLE_PROCESS
) -> LiveTeacher:
    """What `--routing` asks for; auto is sar for a mixture of experts and native for a dense teacher.

    Raises: UsageError with the reason, where the teacher cannot have the routing asked for
    """
    settings, teacher, precision = config.routing, models.teacher, objective.precision
    word, specs, reason = _resolve(
        config, models, objective, process_group.size > 1 and config.train.parallel == "fsdp"
    )
    natively = word == "sar" and settings.sar_routing == "native"
    if word != "native":
        require_routers(teacher, specs, word, natively)
        specs = verify(teacher, specs, lambda: _try(models, precision))
    rule = "native" if natively else "all" if word == "sar" else word
    seed = process_group.seed(config.train.seed)  # every rank draws for its own tokens
    routing = Routing(teacher, specs if word != "native" else [], rule, settings.ka_lambda, seed)
    learner = FROZEN_ROUTERS
    if word == "sar":
        learner = RouterTrainer(objective, routing, settings, config.loss, train.aligner, process_group)
        if settings.activation_checkpointing:
            recompute_activations_(teacher)
    lines = [_line(word, reason, settings, specs)]
    return LiveTeacher(word, routing, learner, lines, config, models, process_group, objective.heads)


def _resolve(config: Config, models: Models, objective: Objective, in_shards: bool) -> tuple[str, list, str]:
    """The routing, the routers, and why it is that one, if nobody asked for it.

    in_shards: the student lies in shards over several devices
    """
    settings, asked = config.routing, config.routing.routing
    if asked == "native":
        return "native", [], ""
    hears = objective.distillation is not None
    needs_states = objective.distillation is not None and objective.distillation.needs_states
    if asked != "auto":
        if not hears:
            raise UsageError(f"--routing {asked}: --alpha_kd is 0, so no teacher is heard; use --routing native")
        if asked == "sar" and needs_states:
            raise UsageError(
                "--routing sar: routers learn from probabilities, and --alignment hidden compares none; use another "
                "alignment, or --routing all"
            )
        if asked == "sar" and in_shards:
            raise UsageError(
                "--routing sar: routers learn from a student that each device has whole, and with --parallel fsdp none "
                "has; use --parallel ddp, or --routing all"
            )
        if asked == "sar" and config.memory.why_routers_stand_still:
            raise UsageError(f"--routing sar: {config.memory.why_routers_stand_still}; use --routing all or native")
        return asked, find_routers(models.teacher, settings.router_patterns), ""
    if not hears:
        return "native", [], "no teacher is heard"
    if needs_states:
        return "native", [], "--alignment hidden compares no probabilities"
    if in_shards:
        return "native", [], "with --parallel fsdp no device has the student whole"
    if config.memory.why_routers_stand_still:
        return "native", [], config.memory.why_routers_stand_still
    try:
        specs = find_routers(models.teacher, settings.router_patterns)
        if specs:
            require_routers(models.teacher, specs, "sar", settings.sar_routing == "native")
    except UsageError as error:
        if settings.router_patterns:
            raise
        return "native", [], f"the teacher's routers cannot learn ({error})"
    return ("sar", specs, "the teacher is a mixture of experts") if specs else ("native", [], "the teacher is dense")


@torch.no_grad()
def _try(models: Models, precision: Precision) -> None:
    teacher: Any = models.teacher
    rows = teacher.get_input_embeddings().weight.shape[0]
    with precision.autocast():
        teacher(input_ids=torch.arange(min(16, rows), device=precision.device)[None], use_cache=False)


def _line(word: str, reason: str, settings: RoutingConfig, specs: list) -> str:
    said = f"--routing {word}" if not reason else f"--routing auto: {word}, because {reason}"
    if word == "native":
        return said if reason else f"{said}, the teacher's own"
    count = sum(parameter.numel() for parameter in router_parameters(specs).values())
    experts = f"{len(specs)} routers of {specs[0].num_experts} experts, {specs[0].top_k} of them in its own routing"
    if word == "sar":
        return (
            f"{said}; {experts}; {count:,} parameters learn, {settings.sar_schedule}, rate "
            f"{settings.router_lr:g}, anchor {settings.router_anchor:g}"
        )
    if word == "ka":
        return f"{said}; {experts}; every expert but one, drawn anew, {settings.ka_passes} steps on the same text"
    return f"{said}; {experts}; every expert active"
