"""On-policy distillation: in which micro-batches the student's own text stands, and what becomes of it.

Sources: GKD (arXiv 2306.13649, Algorithm 1); with a mixture-of-experts teacher arXiv 2502.12947, Algorithms 1 and 2,
where a step begins with the student's responses.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch

from sar_kd.config.runs import Config, OnPolicyConfig
from sar_kd.data.batch import Batch
from sar_kd.data.dataset import Dataset
from sar_kd.errors import UsageError
from sar_kd.models.generation import ISSUES, Generation, write
from sar_kd.models.loading import Models
from sar_kd.runtime.distributed import ProcessGroup
from sar_kd.runtime.precision import Precision
from sar_kd.training.callbacks import Callback
from sar_kd.training.rollouts import Prompt, Response, Rollouts
from sar_kd.training.step import StepReport

_FIRST, _LATE = 10, 10
"""Sampled steps that say how varied the responses are at first, and of late."""

_COLLAPSE = 0.5

_COUNTS = ("responses", "tokens", "ended", "empty", "cut_off")
"""Of all responses: tokens, without the one a response stops with; cut_off: there was no room for more."""


class OnPolicy(Callback):
    """Writes the responses of the on-policy micro-batches, and keeps those that are to be learned from again."""

    def __init__(
        self,
        config: OnPolicyConfig,
        models: Models,
        train: Dataset,
        limits: tuple[int, int],
        precision: Precision,
        seed: int,
    ):
        """limits: most tokens that a block may hold for each model, start token included

        Raises: UsageError where the student's bytes are not known, so that a teacher could not read them
        """
        super().__init__()
        if train.pair.tables is not None and not train.pair.is_exact:
            raise UsageError(
                f"--on_policy_fraction {config.on_policy_fraction:g}: a tokenizer changes text, so that the teacher "
                "cannot read exactly what the student writes; leave the flag out"
            )
        self.config, self.student, self.precision, self.seed = config, models.student, precision, seed
        self.responses = Rollouts(train, *limits)
        self._stops = self.responses.stops()
        self._figures: dict = {}
        self.kept = {
            "replay": [],
            "step": -1,
            "own": {},
            "sampling_seconds": 0.0,
            "first": [],
            "late": [],
            "alarmed": False,
        }
        self.kept["totals"] = dict.fromkeys((*_COUNTS, *ISSUES), 0)

    def is_on_policy(self, place: int) -> bool:
        """Does the student's own text stand in this micro-batch, counted from the start of the run?

        floor((i + 1) f) > floor(i f): the exact share, evenly spread
        """
        return _strikes(place, self.config.on_policy_fraction)

    def micro_batches(self, step: int, made: Sequence[Batch | list[int]]) -> list[Batch]:
        """The micro-batches of a step, responses written for those that are given as the blocks of their prompts.

        step: the same for several attempts on the same text, which then read the same responses
        """
        self._figures = {}
        places = [i for i, each in enumerate(made) if not isinstance(each, Batch)]
        if not places:
            return list(made)  # type: ignore[arg-type]
        started = time.monotonic()
        if self.kept["step"] != step:
            self.kept |= {"step": step, "own": {}}
            self._answer(step, len(made), {place: made[place] for place in places})  # type: ignore[misc]
        batches = []
        for place, each in enumerate(made):
            own = self.kept["own"].get(str(place))
            if isinstance(each, Batch):
                batches.append(each)
            elif own:
                batches.append(self.responses.batch([_response(row) for row in own]))
            else:  # nothing was left of any response: the text that was there
                batches.append(self.responses.train.batch(each))
        self.kept["sampling_seconds"] += time.monotonic() - started
        return batches

    def _answer(self, step: int, num_micro: int, blocks_of: dict[int, list[int]]) -> None:
        """Enter each place's responses in `kept`: from those kept, or written now, all in one go."""
        asked: dict[int, list[Prompt]] = {}
        for place, blocks in blocks_of.items():
            random = np.random.default_rng([self.seed, step, place])
            number = math.floor((step * num_micro + place) * self.config.on_policy_fraction)
            replay = self.kept["replay"]
            if replay and _strikes(number, self.config.replay_fraction):
                picks = random.choice(len(replay), min(len(blocks), len(replay)), replace=False)
                self.kept["own"][str(place)] = [replay[pick] for pick in picks]
                continue
            asked[place] = [self.responses.prompt_of(block, random) for block in blocks]
        if not asked:
            return
        prompts = [prompt for own in asked.values() for prompt in own]
        written = iter(zip(prompts, self._write(step, prompts), strict=True))
        found: list[Generation] = []
        faults: Counter = Counter()
        for place, own in asked.items():
            pairs = [next(written) for _ in own]
            kept, wrong = self.responses.usable(pairs)
            self.kept["own"][str(place)] = [_row(response) for response in kept]
            found += [each for _, each in pairs]
            faults.update(wrong)
        if self.config.replay_size:
            rows = [row for place in asked for row in self.kept["own"][str(place)]]
            self.kept["replay"] = [*self.kept["replay"], *rows][-self.config.replay_size :]
        self._count(found, faults)

    def _write(self, step: int, prompts: list[Prompt]) -> list[Generation]:
        student, config = self.student, self.config
        was_training = student.training
        student.eval()
        seed = int(np.random.SeedSequence([self.seed, step]).generate_state(1)[0])
        with self.precision.same_random(), self.precision.autocast():
            torch.manual_seed(seed)
            written = write(
                student,
                [self.responses.ids_of(prompt) for prompt in prompts],
                stops=self._stops,
                rooms=[self.responses.room_of(prompt, config.max_new_tokens) for prompt in prompts],
                temperature=config.sample_temperature,
                top_p=config.sample_top_p,
            )
        student.train(was_training)
        return written

    def _count(self, found: list[Generation], faults: Counter) -> None:
        lengths = [len(each.ids) for each in found]
        shares = [len(set(each.ids)) / len(each.ids) for each in found if each.ids]
        counts = {
            "responses": len(found),
            "tokens": sum(lengths),
            "ended": sum(each.stop is not None for each in found),
            "empty": sum(not each.ids and each.stop is not None for each in found),
            "cut_off": sum(each.stop is None and each.is_finite for each in found),
            **faults,
        }
        self.kept["totals"] = {name: total + counts.get(name, 0) for name, total in self.kept["totals"].items()}
        distinct = sum(shares) / len(shares) if shares else 0.0
        if len(self.kept["first"]) < _FIRST:
            self.kept["first"].append(distinct)
        self.kept["late"] = [*self.kept["late"], distinct][-_LATE:]
        self._figures |= {
            "responses": len(found),
            "response_length": sum(lengths) / len(found),
            "response_distinct_tokens": distinct,
            "response_end_rate": counts["ended"] / len(found),
            "response_faults": {fault: count for fault, count in faults.items() if count},
        }

    def figures(self) -> dict:
        """Of the last step, for its record."""
        return self._figures

    def note(self, step: int, report: StepReport, micro_batches: Sequence[Batch]) -> tuple[list[str], str | None]:
        """An alarm, once, where the student has come to repeat itself."""
        first, late = self.kept["first"], self.kept["late"]
        if self.kept["alarmed"] or len(first) < _FIRST or len(late) < _LATE:
            return [], None
        before, now = (sum(values) / len(values) for values in (first, late))
        if now >= _COLLAPSE * before:
            return [], None
        self.kept["alarmed"] = True
        return [
            f"Step {step}: the student repeats itself: {now:.0%} of a response's tokens are distinct, {before:.0%} at "
            "first. Lower --student_lr or --on_policy_fraction, or give --alpha_ce weight."
        ], None

    def summary(self) -> dict:
        """All that was written, and how long it took."""
        totals = self.kept["totals"]
        counts, faults = ({name: totals[name] for name in names} for names in (_COUNTS, ISSUES))
        return {"on_policy": {"sampling_seconds": self.kept["sampling_seconds"], **counts, "faults": faults}}


def _strikes(place: int, share: float) -> bool:
    return math.floor((place + 1) * share) > math.floor(place * share)


def _row(response: Response) -> list:
    """As a checkpoint holds it."""
    return [list(response.prompt), response.ids, response.stop]


def _response(row: list) -> Response:
    return Response(Prompt(*row[0]), row[1], row[2])


def build_on_policy(
    config: Config,
    models: Models,
    train: Dataset,
    limits: tuple[int, int],
    precision: Precision,
    process_group: ProcessGroup,
) -> OnPolicy | None:
    """None where the student writes nothing. Raises: UsageError with several processes, and as `OnPolicy`"""
    settings = config.on_policy
    if not settings.on_policy_fraction:
        return None
    if process_group.size > 1:
        raise UsageError(
            f"--on_policy_fraction {settings.on_policy_fraction:g}: takes one process, and {process_group.size} are running; "
            "start it without torchrun"
        )
    return OnPolicy(settings, models, train, limits, precision, config.train.seed)
