"""What `sar-kd shrink` cuts: layers, channels, experts, tokens.

Each cut says in words what it did, and gives the logits that the model has to have then.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from sar_kd.config.fields import require
from sar_kd.config.shrinking import ShrinkConfig, kept_count
from sar_kd.data.dataset import Dataset
from sar_kd.evaluation.layer_influence import LayerInfluence, measure_influence
from sar_kd.models.cut.feed_forward import channel_norms, find_feed_forward, keep_channels_, without_channels
from sar_kd.models.cut.layers import find_layers, keep_layers_, shown_layers, spread_evenly, without_layers
from sar_kd.models.cut.token_rows import ids_in_configs, keep_tokens_
from sar_kd.models.cut.whole_model import WholeModel, probe_logits
from sar_kd.models.model_checks import vocab_size_of
from sar_kd.reporting.shrink_page import Shrunk
from sar_kd.runtime.console import format_share
from sar_kd.runtime.precision import Precision
from sar_kd.teacher.moe.discovery import find_routers
from sar_kd.teacher.moe.expert_cut import count_usage, keep_experts_, require_cuttable, without_experts
from sar_kd.tokenization.vocabulary_cut import CuttableVocabulary

BATCH_SIZE = 4

_NUM_LAST = 2
"""Last layers that are kept, as they form the next token's distribution; one where fewer than 8 layers are kept"""


@dataclass
class Goal:
    """How many parts are kept in the end; each round cuts an equal share of what there is too much."""

    rounds: int
    """This one and those behind it"""
    counts: dict[str, int] = field(default_factory=dict)
    """By option, from the whole model's number of parts"""

    def count(self, name: str, text: str, size: int) -> int:
        """The parts to keep now, of `size`. text: the option's value"""
        final = self.counts.setdefault(name, kept_count(name, text, size))
        surplus, rounds = size - final, self.rounds
        require(surplus >= rounds, name, text, f"cuts {surplus} of {size}, too few for --iterative {rounds}")
        return size - round(surplus / rounds)


@dataclass
class Cutter:
    """A model that is being cut, and what the choice is made on."""

    settings: ShrinkConfig
    whole: WholeModel
    calibration: Dataset
    vocabulary_texts: Callable[[], Iterator[Dataset]]
    """In which the tokens are counted"""
    precision: Precision
    goal: Goal
    shrunk: Shrunk
    vocabulary: CuttableVocabulary | None = None
    """What the tokenizer was before it was cut, and"""
    kept_tokens: tuple[int, ...] = ()
    """the tokens that were kept"""

    def cuts_(self) -> Iterator[Tensor]:
        """Make each cut that is asked for; yields the logits that the model has to have then. Tokens are cut last, as
        the calibration text is in those of before.
        """
        settings = self.settings
        for is_asked, cut_ in (
            (settings.layers or settings.listed_layers, self._cut_layers_),
            (settings.intermediate, self._cut_channels_),
            (settings.experts, self._cut_experts_),
            (settings.vocab_size, self._cut_tokens_),
        ):
            if is_asked:
                yield cut_()

    def _say_(self, line: str, **values: object) -> None:
        rounds = self.settings.iterative
        line = f"Round {rounds - self.goal.rounds + 1}: {line}" if rounds > 1 else line
        self.shrunk = dataclasses.replace(self.shrunk, cuts=[*self.shrunk.cuts, line], **values)  # type: ignore[arg-type]

    def _batches(self):
        return self.calibration.token_batches("student", BATCH_SIZE)

    def _cut_layers_(self) -> Tensor:
        """The logits of the whole model whose other layers hand on what they are given."""
        settings, whole = self.settings, self.whole
        model = whole.model
        name, layers = find_layers(whole.title, model)
        influence = measure_influence(whole.title, model, layers, self._batches())
        kept = choose_layers(settings, influence, self.goal)
        dropped = [index for index in range(len(layers)) if index not in kept]
        with without_layers(layers, dropped):
            expected = probe_logits(model, self.precision)
        keep_layers_(f"{whole.title}, cut", model, name, kept)
        how = "given by hand" if settings.listed_layers else settings.layer_choice
        line = (
            f"Layers: {len(kept)} of {len(layers)} kept ({how}, over {influence.num_tokens:,} tokens); cut, counted "
            f"from 0: {shown_layers(dropped)}"
        )
        self._say_(line, influence=influence.of_each(), dropped_layers=dropped)
        return expected

    def _cut_channels_(self) -> Tensor:
        """The logits of the whole model whose other channels are 0."""
        settings, whole = self.settings, self.whole
        parts, setting, size = find_feed_forward(whole.title, whole.model)
        count = self.goal.count("intermediate", settings.intermediate, size)
        norms = channel_norms(whole.model, parts, self._batches())
        kept = [each.topk(count).indices.sort().values for each in norms]
        with without_channels(parts, kept):
            expected = probe_logits(whole.model, self.precision)
        keep_channels_(f"{whole.title}, cut", whole.model, parts, kept, setting)
        line = (
            f"Feed-forward: {count:,} of {size:,} channels kept in each of {len(parts)} parts, those of the largest "
            f"norm over {self.calibration.num_tokens:,} tokens"
        )
        self._say_(line)
        return expected

    def _cut_experts_(self) -> Tensor:
        """The logits of the whole model whose routers choose among the kept experts alone."""
        settings, whole = self.settings, self.whole
        specs = find_routers(whole.model)
        require_cuttable(whole.title, whole.model, specs)
        size, top_k = specs[0].num_experts, max(spec.top_k for spec in specs)
        count = self.goal.count("experts", settings.experts, size)
        enough = self.goal.counts["experts"] >= top_k  # in the last round
        require(enough, "experts", settings.experts, f"each token takes {top_k} experts; keep at least as many")
        usage = count_usage(whole.model, specs, self._batches())
        kept = [each.topk(count).indices.sort().values for each in usage]
        chosen = sum(int(each[indices].sum()) for each, indices in zip(usage, kept, strict=True))
        share = format_share(chosen / sum(int(each.sum()) for each in usage))
        with without_experts(whole.title, specs, kept):
            expected = probe_logits(whole.model, self.precision)
        keep_experts_(f"{whole.title}, cut", whole.model, specs, kept)
        line = (
            f"Experts: {count} of {size} kept in each of {len(specs)} blocks, those that "
            f"{self.calibration.num_tokens:,} tokens use most: {share} of their choices"
        )
        self._say_(line)
        return expected

    def _cut_tokens_(self) -> Tensor:
        """The logits of the whole model, for kept tokens only and on a text of them."""
        whole, size = self.whole, vocab_size_of(self.whole.model)
        vocabulary = CuttableVocabulary(whole.title, whole.tokenizer)
        count = self.goal.count("vocab_size", self.settings.vocab_size, size)
        usage = sum((_usage(text, size) for text in self.vocabulary_texts()), np.zeros(size, np.int64))
        required = vocabulary.required(ids_in_configs(whole.title, whole.model))
        num_required = vocabulary.require_room(required, size, self.goal.counts["vocab_size"])  # in the last round
        self.vocabulary, self.kept_tokens = vocabulary, tuple(vocabulary.choose(usage, required, count))
        rows = [index for index in self.kept_tokens if index < size]
        expected = probe_logits(whole.model, self.precision, rows)
        keep_tokens_(f"{whole.title}, cut", whole.model, self.kept_tokens)
        whole.tokenizer = vocabulary.keep(self.kept_tokens)
        share = format_share(usage[rows].sum() / usage.sum())
        self._say_(
            f"Vocabulary: {len(rows):,} of {size:,} tokens kept: {num_required:,} that stay in any case; in all, "
            f"{(usage[rows] > 0).sum():,} of the {(usage > 0).sum():,} that the text uses, {share} of its tokens"
        )
        return expected

    def check_tokenizer(self, written: WholeModel) -> None:
        """Raise UsageError if the tokens were cut and the written ones are not those, or spell texts otherwise."""
        if self.vocabulary:
            self.vocabulary.check(self.kept_tokens, written.tokenizer)


def _usage(text: Dataset, size: int) -> np.ndarray:
    return np.bincount(text.text.student.ids, minlength=size)


def choose_layers(settings: ShrinkConfig, influence: LayerInfluence, goal: Goal) -> list[int]:
    """The layers to keep, ascending. Raises: UsageError if there are not so many, or nothing would be cut"""
    total, listed = influence.num_layers, settings.listed_layers
    if listed:
        choice = settings.layer_choice
        require(listed[-1] < total, "layer_choice", choice, f"the model has layers 0 to {total - 1}")
        require(len(listed) < total, "layer_choice", choice, "keeps every layer of the model; leave some out")
        return list(listed)
    count = goal.count("layers", settings.layers, total)
    if settings.layer_choice == "even":
        return spread_evenly(total, count)
    num_last, size = _NUM_LAST if count >= 8 else 1, total - count
    if settings.layer_choice == "influence":
        first = influence.least(size, num_last)
    else:
        first = count if settings.layer_choice == "first" else count - num_last
    return [index for index in range(total) if not first <= index < first + size]
