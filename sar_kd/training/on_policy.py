"""On-policy distillation: which micro-batches hold responses of the student, their generation, the replay buffer.

Sources: GKD (arXiv 2306.13649, Algorithm 1); with a mixture-of-experts teacher arXiv 2502.12947, Algorithms 1 and 2,
where a step begins with the student's responses.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from sar_kd.config.presets import first_on_policy_step
from sar_kd.config.runs import Config, OnPolicyConfig
from sar_kd.data.batch import Batch
from sar_kd.data.dataset import Dataset
from sar_kd.models.generation import ISSUES, Generation, generate
from sar_kd.models.lm_head import in_eval_mode
from sar_kd.models.loading import Models
from sar_kd.runtime.precision import Precision
from sar_kd.training.callbacks import Callback, MicroBatches, StepResult
from sar_kd.training.parallel import SINGLE_DEVICE, ParallelStrategy
from sar_kd.training.rollouts import Prompt, Response, Rollouts
from sar_kd.training.step import StepReport

_NUM_COMPARED = 10
"""Steps with generation whose metrics are averaged: the first ones, and the last ones."""


class _Alarm(NamedTuple):
    """A metric of a step's responses, and when its change since the first steps is a warning."""

    metric: str
    is_due: Callable[[float, float], bool]
    """By the metric at first and now"""
    text: str


_ALARMS = {
    "repetition": _Alarm(
        "response_distinct_tokens", lambda first, now: now < 0.5 * first,
        "the student repeats itself: {now:.0%} of a response's tokens are distinct, {first:.0%} at first",
    ),
    "length": _Alarm(
        "response_length", lambda first, now: now > 1.5 * first,
        "the student's responses grow: {now:.1f} tokens on average, {first:.1f} at first",
    ),
    "cut_off": _Alarm(
        "response_cut_off_rate", lambda first, now: now > first + 0.25,
        "more of the student's responses do not end: {now:.0%} reach the most tokens, {first:.0%} at first",
    ),
}  # fmt: skip

_REMEDY = "Lower --student_lr or --on_policy_fraction, or give --alpha_ce weight."

_COUNTS = ("responses", "tokens", "ended", "empty", "cut_off")
"""Of all responses: tokens without the stop token; cut_off: at `max_new_tokens`."""


def build_on_policy(
    config: Config,
    models: Models,
    train: Dataset,
    limits: tuple[int, int],
    precision: Precision,
    strategy: ParallelStrategy,
) -> OnPolicy | None:
    """None if no micro-batch is on-policy."""
    if not config.on_policy.on_policy_fraction:
        return None
    passes = config.routing.ka_passes if config.routing.routing == "ka" else 1
    first_step = first_on_policy_step(config.on_policy.on_policy_start, config.train.train_steps, passes)
    first = first_step * config.train.grad_accum_steps
    return OnPolicy(config.on_policy, models, train, limits, precision, config.train.seed, strategy, first)


class OnPolicy(Callback):
    """Generates the responses of the on-policy micro-batches, and keeps a replay buffer of them.

    Of several ranks each generates those to its own prompts. Then all have the responses, counts and the replay buffer
    of all, and each takes its part of every micro-batch.
    """

    def __init__(
        self,
        config: OnPolicyConfig,
        models: Models,
        train: Dataset,
        limits: tuple[int, int],
        precision: Precision,
        seed: int,
        strategy: ParallelStrategy = SINGLE_DEVICE,
        first: int = 0,
    ):
        """limits: most tokens of a block for each model, start token included

        first: the first micro-batch that may be on-policy, counted from the start of the run
        """
        super().__init__()
        self._first = first
        self._strategy, self._process_group = strategy, strategy.process_group
        self.config, self.student, self.precision, self.seed = config, models.student, precision, seed
        self.rollouts = Rollouts(train, *limits)
        self._stop_token_ids = self.rollouts.stop_token_ids()
        self._metrics: dict = {}
        self.state: dict[str, Any] = {"replay": [], "step": -1, "responses": {}, "sampling_seconds": 0.0}
        self.state |= {"first_metrics": [], "last_metrics": [], "alarms": dict.fromkeys(_ALARMS, 0)}
        self.state["totals"] = dict.fromkeys((*_COUNTS, *ISSUES), 0)
        self._next = self.state
        """The state after the attempt under way; an attempt that fails changes nothing that a checkpoint keeps"""

    def is_on_policy(self, index: int) -> bool:
        """Is the micro-batch on-policy, counted from the start of the run?

        floor((i + 1) f) > floor(i f): the exact share, evenly spread; i counts from the first that may be
        """
        return index >= self._first and _is_due(index - self._first, self.config.on_policy_fraction)

    def micro_batches(self, step: int, made: Sequence[Batch | list[int]]) -> list[Batch]:
        """This rank's micro-batches of a step.

        step: the same for consecutive steps on the same text, which then have the same responses
        made: a batch, or for an on-policy micro-batch the blocks of this rank's prompts
        """
        self._metrics, self._next = {}, dict(self.state)
        state = self._next
        blocks = {index: item for index, item in enumerate(made) if not isinstance(item, Batch)}
        started = time.monotonic()
        if blocks and state["step"] != step:
            state |= {"step": step, "responses": {}}
            self._fill_responses(step, len(made), blocks)
        batches = self.batches(made, self._process_group.rank)
        if blocks:
            state["sampling_seconds"] += time.monotonic() - started
        return batches

    def batches(self, made: Sequence[Batch | list[int]], rank: int) -> list[Batch]:
        """The micro-batches of a rank in the step under way, whose responses are there. made: that rank's own"""
        batches, size = [], self._process_group.size
        for index, item in enumerate(made):
            responses = [_from_json(response) for response in self._next["responses"].get(str(index), ())]
            own = responses[rank * len(responses) // size : (rank + 1) * len(responses) // size]
            if isinstance(item, Batch):
                batches.append(item)
            elif responses:  # fewer than ranks: one has none, and learns nothing
                batches.append(self.rollouts.batch(own or responses[:1], is_learned=bool(own)))
            else:  # no response is usable: the text itself
                batches.append(self.rollouts.train.batch(item))
        return batches

    def _fill_responses(self, step: int, num_micro_batches: int, blocks: dict[int, list[int]]) -> None:
        """Set the responses of each on-policy micro-batch: from the replay buffer, or generated, all in one batch."""
        prompts: dict[int, list[Prompt]] = {}
        responses, replay, group = self._next["responses"], self._next["replay"], self._process_group
        for index, own_blocks in blocks.items():
            position = step * num_micro_batches + index - self._first
            num_before = math.floor(position * self.config.on_policy_fraction)
            if replay and _is_due(num_before, self.config.replay_fraction):
                rng = np.random.default_rng([self.seed, step, index])
                picks = rng.choice(len(replay), min(group.size * len(own_blocks), len(replay)), replace=False)
                responses[str(index)] = [replay[pick] for pick in picks]
            else:  # a prompt depends on its place among those of all ranks, so any number of them has the same ones
                places = enumerate(own_blocks, group.rank * len(own_blocks))
                rngs = ((block, np.random.default_rng([self.seed, step, index, place])) for place, block in places)
                prompts[index] = [self.rollouts.sample_prompt(block, rng) for block, rng in rngs]
        if not prompts:
            return
        own_prompts = [prompt for own in prompts.values() for prompt in own]
        own_pairs = list(zip(own_prompts, self._generate(step, own_prompts), strict=True))
        by_rank = [iter(pairs) for pairs in group.all_gather_object(own_pairs)]
        generations, issues = list[Generation](), Counter[str]()
        for index, own in prompts.items():
            pairs = [pair for pairs in by_rank for pair in itertools.islice(pairs, len(own))]
            usable, own_issues = self.rollouts.keep_usable(pairs)
            responses[str(index)] = [_to_json(response) for response in usable]
            generations += [generation for _, generation in pairs]
            issues.update(own_issues)
        if self.config.replay_size:
            new = [response for index in prompts for response in responses[str(index)]]
            self._next["replay"] = [*replay, *new][-self.config.replay_size :]
        self._count(generations, issues)

    def _generate(self, step: int, prompts: list[Prompt]) -> list[Generation]:
        return self._strategy.inference(partial(self._sample, step, prompts), whole=True)

    def _sample(self, step: int, prompts: list[Prompt]) -> list[Generation]:
        student, config = self.student, self.config
        seed = int(np.random.SeedSequence([self.seed, step, self._process_group.rank]).generate_state(1)[0])
        with in_eval_mode(student), self.precision.fork_rng(), self.precision.autocast():
            torch.manual_seed(seed)
            return generate(
                student,
                [self.rollouts.prompt_ids(prompt) for prompt in prompts],
                stop_token_ids=self._stop_token_ids,
                max_new_tokens=[self.rollouts.max_new_tokens(prompt, config.max_new_tokens) for prompt in prompts],
                temperature=config.sample_temperature,
                top_p=config.sample_top_p,
            )

    def _count(self, generations: list[Generation], issues: Counter) -> None:
        state, lengths = self._next, [len(generation.ids) for generation in generations]
        distinct_shares = [len(set(g.ids)) / len(g.ids) for g in generations if g.ids]
        counts = {
            "responses": len(generations),
            "tokens": sum(lengths),
            "ended": sum(g.stop is not None for g in generations),
            "empty": sum(not g.ids and g.stop is not None for g in generations),
            "cut_off": sum(g.stop is None and g.is_finite for g in generations),
            **issues,
        }
        state["totals"] = {name: total + counts.get(name, 0) for name, total in state["totals"].items()}
        metrics = {
            "response_length": sum(lengths) / len(generations),
            "response_distinct_tokens": sum(distinct_shares) / max(1, len(distinct_shares)),
            "response_end_rate": counts["ended"] / len(generations),
            "response_cut_off_rate": counts["cut_off"] / len(generations),
        }
        state["first_metrics"] = [*state["first_metrics"], metrics][:_NUM_COMPARED]
        state["last_metrics"] = [*state["last_metrics"], metrics][-_NUM_COMPARED:]
        alarms = [name for name in _ALARMS if self._is_due(name)]
        state["alarms"] = {name: count + (name in alarms) for name, count in state["alarms"].items()}
        self._metrics |= {
            "responses": len(generations),
            **metrics,
            "response_alarms": alarms,
            "response_faults": {issue: count for issue, count in issues.items() if count},
        }

    def _first_and_now(self, name: str) -> tuple[float, ...]:
        """The mean of an alarm's metric over the first steps, and over the last ones."""
        metric, state = _ALARMS[name].metric, self._next
        return tuple(sum(m[metric] for m in state[when]) / _NUM_COMPARED for when in ("first_metrics", "last_metrics"))

    def _is_due(self, name: str) -> bool:
        is_known = len(self._next["first_metrics"]) == _NUM_COMPARED
        return is_known and _ALARMS[name].is_due(*self._first_and_now(name))

    def metrics(self) -> dict:
        return self._metrics

    def on_step_end(self, step: int, report: StepReport, micro_batches: MicroBatches) -> StepResult:
        """A message about each alarm, at the first step that has it."""
        self.state, messages = self._next, []
        for name in self._metrics.get("response_alarms", ()):
            if self.state["alarms"][name] == 1:
                first, now = self._first_and_now(name)
                messages.append(f"Step {step}: {_ALARMS[name].text.format(first=first, now=now)}. {_REMEDY}")
        return messages, None

    def summary(self) -> dict:
        totals = self.state["totals"]
        counts, issues = ({name: totals[name] for name in names} for names in (_COUNTS, ISSUES))
        found = {"sampling_seconds": self.state["sampling_seconds"], **counts, "issues": issues}
        return {"on_policy": {**found, "alarms": self.state["alarms"]}}


def _is_due(index: int, share: float) -> bool:
    return math.floor((index + 1) * share) > math.floor(index * share)


def _to_json(response: Response) -> list:
    """A response as a checkpoint holds it."""
    return [list(response.prompt), response.ids, response.stop]


def _from_json(response: list) -> Response:
    return Response(Prompt(*response[0]), response[1], response[2])
