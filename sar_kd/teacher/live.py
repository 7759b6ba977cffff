"""A loaded teacher: the routing it runs with, its evaluation and alarms, and the files of routers that learn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sar_kd.alignment.aligner import Aligner
from sar_kd.config.runs import Config, RoutingConfig
from sar_kd.config.unused_options import ROUTER_OPTIONS
from sar_kd.data.dataset import Dataset
from sar_kd.errors import UsageError
from sar_kd.evaluation.perplexity import Evaluation, evaluate
from sar_kd.losses.objective import Objective
from sar_kd.models.memory_saving import recompute_activations_
from sar_kd.runtime.distributed import SINGLE_PROCESS, ProcessGroup
from sar_kd.runtime.precision import Precision
from sar_kd.teacher.base import Teacher
from sar_kd.teacher.moe.discovery import RouterSpec, describe_routers, find_routers, require_routers, router_parameters
from sar_kd.teacher.moe.router_checkpoint import FILE, save_router_update
from sar_kd.teacher.moe.router_metrics import RouterStatistics, find_alarms, teacher_metrics
from sar_kd.teacher.moe.router_training import FROZEN_ROUTERS, FrozenRouters, RouterTrainer
from sar_kd.teacher.moe.routing_hooks import Routing, verify

MAX_PERPLEXITY_INCREASE = 0.05
"""`--sar_routing auto` activates every expert unless the teacher's perplexity rises by more than this share."""


class LiveTeacher(Teacher):
    """A loaded teacher with the routing that `--routing` names, and its routers."""

    def __init__(
        self, config: Config, objective: Objective, aligner: Aligner, process_group: ProcessGroup = SINGLE_PROCESS
    ):
        """Raises: UsageError with the reason, if the teacher does not support that routing."""
        self._config, self._objective, self._process_group = config, objective, process_group
        settings, model = config.routing, objective.teacher
        is_sharded = process_group.size > 1 and config.train.parallel == "fsdp"
        name, specs, reason = _choose_routing(config, objective, is_sharded)
        trains_natively = name == "sar" and settings.sar_routing == "native"
        if name != "native":
            require_routers(model, specs, name, trains_natively)
            specs = verify(specs, lambda: _run_once(model, objective.precision))
        self.routing_name = name
        """'native', 'all', 'ka' or 'sar'"""
        rule = "native" if trains_natively else "all" if name == "sar" else name
        seed = process_group.seed(config.train.seed)  # each rank draws for its own tokens
        self.routing = Routing(model, specs, rule, settings.ka_lambda, seed)
        self.router_trainer: RouterTrainer | None = None
        if name == "sar":
            self.max_nonfinite = 0.0  # the gradient of the routers would not be finite either
            self.router_trainer = RouterTrainer(objective, self.routing, settings, config.loss, aligner, process_group)
            if settings.activation_checkpointing:
                recompute_activations_(model)
        self.passes = settings.ka_passes if name == "ka" else 1
        line = _describe_routing(name, reason, settings, specs)
        self.lines, self.details = ([], [line]) if name == "native" and not reason else ([line], [])
        self.lines += _unused_options(settings) if name == "native" and reason else []
        self.start: dict = {}
        self.last: dict = {}
        self.alarms: list[str] = []
        self.stopped_at: int | None = None
        """The step after which the routers stopped learning, because of an alarm"""

    def __enter__(self) -> LiveTeacher:
        self.routing.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        self.routing.__exit__(*exception)

    def router_trainer_at(self, step: int, lr_at: Callable[[float], float]) -> FrozenRouters:
        if self.router_trainer is None or self.stopped_at is not None:
            return FROZEN_ROUTERS
        self.router_trainer.set_learning_rate_(lr_at(self._config.routing.router_lr))
        self.router_trainer.measures_effect = (step + 1) % self._config.train.log_steps == 0
        return self.router_trainer

    def evaluate_start(self, validation: Dataset, precision: Precision) -> tuple[dict, list[str]]:
        self.start = self._evaluate(validation, precision)
        lines = self._choose_experts(validation, precision)
        self.last = self.start
        metrics = {name: self.start[f"teacher_{name}_native"] for name in ("val_ppl", "val_bits_per_byte")}
        how = "routed" if "teacher_val_ppl_routed" in self.start else "native"
        share = self.start.get(f"teacher_val_nonfinite_{how}")
        return metrics | ({"val_nonfinite": share} if share else {}), lines

    def _choose_experts(self, validation: Dataset, precision: Precision) -> list[str]:
        """Compare the perplexity of both routings, choose the experts of `--sar_routing auto`; lines to show.

        No mixture of experts was trained with every expert active, and some are useless that way.
        """
        if self.routing_name == "native":
            return []
        native, routed = (self.start[f"teacher_val_ppl_{routing}"] for routing in ("native", "routed"))
        if self.routing.rule == "native":
            return [f"Teacher's perplexity: {native:.2f} in its own routing, in which its routers learn"]
        active = "every expert active" if self.routing.rule == "all" else "every expert but one"
        line = f"Teacher's perplexity: {native:.2f} in its own routing, {routed:.2f} with {active}"
        if routed <= (1 + MAX_PERPLEXITY_INCREASE) * native:
            return [line]
        line += f", which is more than {MAX_PERPLEXITY_INCREASE:.0%} worse"
        is_free = self.routing_name == "sar" and self._config.routing.sar_routing == "auto"
        if not is_free or not all(spec.has_native_gradient for spec in self.routing.specs):
            return [line + ": the student learns from a weaker teacher; --routing native uses it as it is"]
        self.routing.use("native")
        self.start = self._evaluate(validation, precision)
        return [line + ": the routers learn in its own routing instead (--sar_routing all keeps every expert active)"]

    def evaluate_routers(self, step: int, validation: Dataset, precision: Precision) -> tuple[dict, list[str]]:
        if self.router_trainer is None:
            return {}, []
        self.last = self._evaluate(validation, precision) | {"router_change": self.router_trainer.changes()}
        alarms = [(name, line) for name, line in find_alarms(self.start, self.last) if name not in self.alarms]
        self.alarms += [name for name, _ in alarms]
        lines = [f"Step {step}: alarm, {line}" for _, line in alarms]
        if alarms and self._config.routing.router_stop_on_drift and self.stopped_at is None:
            self.stopped_at = step
            lines.append(f"Step {step}: the routers stop learning (--router_stop_on_drift); the student goes on")
        elif alarms:
            lines.append("The routers go on learning; --router_stop_on_drift stops them at an alarm")
        return self.last, lines

    def _evaluate(self, validation: Dataset, precision: Precision) -> dict:
        """Metrics of the teacher in its own routing and in the run's, with the entropy and usage of its routers."""
        with self.routing.using("native"):
            native, router_metrics = self._evaluate_once(validation, precision)
        self.group_nats = native.group_nats
        if self.routing_name == "native":
            return teacher_metrics(native, "native")
        routed = native
        if self.routing.rule != "native":
            with self.routing.fork_rng():
                routed, router_metrics = self._evaluate_once(validation, precision)
        return teacher_metrics(native, "native") | teacher_metrics(routed, "routed") | router_metrics

    def _evaluate_once(self, validation: Dataset, precision: Precision) -> tuple[Evaluation, dict]:
        statistics = RouterStatistics(self.routing, self._process_group)
        evaluation = evaluate(
            self.routing.model,
            validation.token_batches("teacher", self._config.train.per_device_batch_size),
            validation.text.num_bytes,
            precision,
            self._process_group,
            heads=self._objective.heads,
            workspace_mb=self._config.loss.loss_workspace_mb,
            after_batch=statistics.add,
            num_groups=validation.num_groups,
        )
        return evaluation, statistics.metrics()

    def save(self, folder: Path, step: int) -> None:
        """Check that the frozen part is unchanged, then write `router_update.safetensors`, if routers learn."""
        trainer = self.router_trainer
        if trainer is None:
            return
        trainer.check_frozen()
        metadata = {
            "base_model": self._config.models.teacher_model,
            "architecture": type(self.routing.model).__name__,
            "dtype": str(next(self.routing.model.parameters()).dtype).removeprefix("torch."),
            "frozen_sha256": trainer.frozen_sha256,
            "initial_sha256": trainer.initial_sha256,
            "rounded_sha256": trainer.rounded_sha256,
            "step": step,
            "routers": describe_routers(self.routing.specs),
            "sar_routing": self.routing.rule,
            "sar_schedule": self._config.routing.sar_schedule,
        }
        self._process_group.on_rank_zero(lambda: save_router_update(folder / FILE, trainer.parameters, metadata))

    def summary(self) -> dict:
        found: dict = {"routing": self.routing_name, "experts": self.routing.rule, "router_start": self.start}
        if self.router_trainer is not None:
            found |= {"router_final": self.last, "router_alarms": self.alarms, "router_stopped_at": self.stopped_at}
            found["frozen_sha256"] = self.router_trainer.frozen_sha256
        return found

    def state_dict(self) -> dict:
        return {
            "generators": self._process_group.all_gather_object(self.routing.state_dict()),  # by rank
            "rule": self.routing.rule,
            "router_trainer": {} if self.router_trainer is None else self.router_trainer.state_dict(),
            "start": self.start,
            "last": self.last,
            "alarms": self.alarms,
            "stopped_at": self.stopped_at,
        }

    def load_state_dict(self, state: dict) -> None:
        if self.router_trainer is not None:
            self.router_trainer.load_state_dict(state["router_trainer"])
        self.routing.load_state_dict(state["generators"][self._process_group.rank])
        self.routing.use(state["rule"])
        self.start, self.last = state["start"], state["last"]
        self.alarms, self.stopped_at = list(state["alarms"]), state["stopped_at"]


def _choose_routing(config: Config, objective: Objective, is_sharded: bool) -> tuple[str, list[RouterSpec], str]:
    """The routing's name, the routers, and the reason where `--routing auto` chose it.

    auto is sar for a mixture of experts whose routers can learn, native for any other teacher.
    is_sharded: the student's weights are sharded over devices
    """
    settings, option = config.routing, config.routing.routing
    if option == "native":
        return "native", [], ""
    if option != "auto":  # what stands in its way was refused with the options
        return option, find_routers(objective.teacher, settings.router_patterns), ""
    if obstacle := config.routing_obstacle(trains_routers=True, is_sharded=is_sharded):
        return "native", [], obstacle[0]
    try:
        specs = find_routers(objective.teacher, settings.router_patterns)
        if specs:
            require_routers(objective.teacher, specs, "sar", settings.sar_routing == "native")
    except UsageError as error:
        if settings.router_patterns:
            raise
        return "native", [], f"the teacher's routers cannot learn ({error})"
    return ("sar", specs, "the teacher is a mixture of experts") if specs else ("native", [], "the teacher is dense")


@torch.no_grad()
def _run_once(model: Any, precision: Precision) -> None:
    vocab_size = model.get_input_embeddings().weight.shape[0]
    with precision.autocast():
        model(input_ids=torch.arange(min(16, vocab_size), device=precision.device)[None], use_cache=False)


def _unused_options(settings: RoutingConfig) -> list[str]:
    """A line about options of routers that learn, where `--routing auto` finds that none can."""
    unset = RoutingConfig()
    names = [f"--{name}" for name in ROUTER_OPTIONS if getattr(settings, name) != getattr(unset, name)]
    verb = "has" if len(names) == 1 else "have"
    return [f"{', '.join(names)}: {verb} no effect, as no router learns"] if names else []


def _describe_routing(name: str, reason: str, settings: RoutingConfig, specs: list[RouterSpec]) -> str:
    line = f"Routing: {name}" + (f" (--routing auto, because {reason})" if reason else "")
    if name == "native":
        return line if reason else f"{line}, the teacher is used as it is"
    line += f"; {len(specs)} routers of {specs[0].num_experts} experts, {specs[0].top_k} of them in its own routing"
    if name == "sar":
        count = sum(parameter.numel() for parameter in router_parameters(specs).values())
        return (
            f"{line}; {count:,} parameters learn, {settings.sar_schedule}, rate {settings.router_lr:g}, anchor "
            f"{settings.router_anchor:g}"
        )
    if name == "ka":
        return f"{line}; every expert but one, redrawn each time, {settings.ka_passes} steps on the same text"
    return f"{line}; every expert active"
