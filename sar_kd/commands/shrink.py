"""`sar-kd shrink`: cut a model down to a smaller one, a student for distillation.

The cut model is written aside, loaded again and compared with what was cut before the folder gets its name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from sar_kd.commands.cuts import BATCH_SIZE, Cutter, Goal
from sar_kd.commands.healing import HEALING, heal, healed_student
from sar_kd.config.installation import program_name
from sar_kd.config.sections import DeviceConfig
from sar_kd.config.shrinking import ShrinkingConfig
from sar_kd.data.dataset import Dataset, build_dataset
from sar_kd.data.files.samples import Conversation, Sample
from sar_kd.data.files.sources import Documents, load_documents, load_whole_texts
from sar_kd.data.token_cache import TokenCache
from sar_kd.errors import UsageError
from sar_kd.evaluation.perplexity import Evaluation, evaluate
from sar_kd.models.cut.layers import check_follows
from sar_kd.models.cut.whole_model import WholeModel, check_equal, load_whole, probe_logits
from sar_kd.models.generation import generate
from sar_kd.models.model_checks import context_length_of, vocab_size_of
from sar_kd.models.pretrained import rebuild_on_meta
from sar_kd.reporting.report import require_matplotlib
from sar_kd.reporting.shrink_page import PAGE, Measured, Shrunk, build_shrink_card, build_shrink_page
from sar_kd.runtime.console import print_stderr
from sar_kd.runtime.distributed import join_process_group
from sar_kd.runtime.files import FolderLock, atomic_rename, atomic_write, json_safe
from sar_kd.runtime.precision import Precision, setup_precision
from sar_kd.training.checkpoint import save_student

_PROMPT, _NEW_TOKENS = 8, 16
"""Tokens of the generation whose time is measured"""


def main(config: ShrinkingConfig) -> dict:
    """Cut `--model`, write it into `--output_dir`, and print what it was worth before and after; `--json`: as JSON.

    Raises: UsageError for what the user can mend; TrainingDiverged as a run, with `--heal_steps`
    """
    if join_process_group().size > 1:
        raise UsageError("shrink: one process cuts; start it without torchrun")
    folder = Path(config.shrink.output_dir)
    _check_new(folder)
    lock = FolderLock(folder.parent, "output_dir", folder.name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock.acquire()
    try:
        _check_new(folder)  # again: another command may have ended in the meantime
        return _cut(config, folder)
    finally:
        lock.release()


def _cut(config: ShrinkingConfig, folder: Path) -> dict:
    settings = config.shrink
    require_matplotlib("shrink")
    documents = load_documents(config.data, print_stderr)  # before the weights: a mistake in the files shows at once
    named = load_whole_texts("vocab_from", settings.vocab_from, config.data.text_field)
    texts = _Texts(
        config,
        [list(_beginning(text, chars)) for text, chars in zip(documents, settings.text_sizes, strict=True)],
        named or [documents[0]],
    )
    goal, source, shrunk, status = Goal(settings.iterative), settings.model, None, "finished"
    place = folder
    while goal.rounds and status == "finished":
        place = folder if goal.rounds == 1 else folder / f"round_{settings.iterative - goal.rounds + 1}"
        shrunk = _shrink(config, source, place, texts, goal, shrunk)
        if settings.heal_steps:
            status, source = heal(config, place), str(healed_student(place))
        if settings.heal_steps and status == "finished":
            run = Path(source).relative_to(place).as_posix()
            shrunk = dataclasses.replace(shrunk, healed=_measure_healed(config, source, texts), run=run)
            _write_pages(shrunk, place, place.name)
        goal.rounds -= 1
    assert shrunk is not None
    _report(shrunk, place, config)
    return {"status": status}


@dataclass(frozen=True)
class _Texts:
    """The texts, and a model's tokens of them."""

    config: ShrinkingConfig
    samples: list[list[Sample]]
    """What the choice is made on, and what is held out"""
    vocabulary: list[Documents]
    """What the tokens are counted in"""

    def datasets(self, whole: WholeModel) -> tuple[Dataset, Dataset]:
        """The text that the choice is made on and the held-out one."""
        calibration, held_out = (
            self._dataset(whole, text, option)
            for text, option in zip(self.samples, self.config.data.text_options(), strict=True)
        )
        return calibration, held_out

    def vocabulary_texts(self, whole: WholeModel) -> Iterator[Dataset]:
        """The texts whose tokens are counted."""
        for text in self.vocabulary:
            yield self._dataset(whole, text, "--vocab_from")

    def _dataset(self, whole: WholeModel, text: Documents, option: str) -> Dataset:
        size, context = self.config.data.block_size, context_length_of(whole.model)
        if context and context < size:
            raise UsageError(f"--block_size {size}: the model takes {context} tokens at most; lower it")
        cache = TokenCache(self.config.data.token_cache)
        return build_dataset(text, whole.pair, size, size, cache, option=option)


def _load(config: ShrinkingConfig, name: str, title: str = "") -> tuple[WholeModel, Precision]:
    settings = config.shrink
    precision = setup_precision(DeviceConfig(device=settings.device, model_dtype="float32"), 0)
    return load_whole(name, settings.trust_remote_code, precision, config.data.template_date, title), precision


def _shrink(
    config: ShrinkingConfig, source: str, folder: Path, texts: _Texts, goal: Goal, last: Shrunk | None
) -> Shrunk:
    """Cut a model once, and write it; returns what was done to it since the first round. last: the round before"""
    settings, say = config.shrink, print_stderr if config.output.json else print
    whole, precision = _load(config, source)
    say(f"{source}: {type(whole.model).__name__}, {whole.num_parameters:,} parameters")
    calibration, held_out = texts.datasets(whole)
    if last is None:
        before, evaluation = _measure(whole, held_out, precision)
        shrunk = Shrunk(settings.model, f"{evaluation.num_bytes:,} bytes of {config.data.describe()}", before)
    else:
        shrunk = last.next_round()
    vocabulary_texts = partial(texts.vocabulary_texts, whole)
    cutter = Cutter(settings, whole, calibration, vocabulary_texts, precision, goal, shrunk)
    for expected in cutter.cuts_():
        say(cutter.shrunk.cuts[-1])
        check_follows(whole.title, whole.model, rebuild_on_meta(f"{whole.title}, cut", whole.model))
        check_equal(whole.title, probe_logits(whole.model, precision), expected)
    with _written_aside(folder) as partial_folder:
        whole.restore_dtypes_()
        save_student(whole.model, whole.tokenizer, partial_folder)
        del whole.model  # its memory is the next one's
        written, _ = _load(config, str(partial_folder), f"{whole.title}, cut")
        cutter.check_tokenizer(written)
        check_equal(whole.title, probe_logits(written.model, precision), expected)
        calibration, held_out = texts.datasets(written)
        after, evaluation = _measure(written, held_out, precision)
        warnings = _compare_with_chance(evaluation, calibration, held_out)
        shrunk = dataclasses.replace(cutter.shrunk, after=after, warnings=warnings)
        _write_pages(shrunk, partial_folder, folder.name)
    return shrunk


def _measure_healed(config: ShrinkingConfig, name: str, texts: _Texts) -> Measured:
    healed, precision = _load(config, name)
    return _measure(healed, texts.datasets(healed)[1], precision)[0]


def _write_pages(shrunk: Shrunk, folder: Path, title: str) -> None:
    atomic_write(folder / "README.md", build_shrink_card(shrunk, title))
    atomic_write(folder / PAGE, build_shrink_page(shrunk))


def _check_new(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"--output_dir {folder}: is there already, and nothing is overwritten; name another folder")
    existing = next(path for path in folder.absolute().parents if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UsageError(f"--output_dir {folder}: cannot be written ({existing} is no folder that can be)")


def _beginning(documents: Documents, num_chars: int) -> Iterator[Sample]:
    """The first documents, this many characters of them; a conversation is not cut."""
    for sample in documents:
        if num_chars <= 0:
            break
        is_cut = not isinstance(sample, Conversation) and sample.num_chars > num_chars
        yield sample.part(0, num_chars, sample.name) if is_cut else sample  # type: ignore[union-attr]
        num_chars -= sample.num_chars


def _measure(whole: WholeModel, held_out: Dataset, precision: Precision) -> tuple[Measured, Evaluation]:
    batches = held_out.token_batches("student", BATCH_SIZE)
    evaluation = evaluate(whole.model, batches, held_out.text.num_bytes, precision)
    seconds = _seconds_per_token(whole, held_out.text.student.ids[:_PROMPT].tolist())
    values = evaluation.num_tokens / evaluation.num_bytes, evaluation.perplexity, evaluation.bits_per_byte, seconds
    return Measured(whole.num_parameters, whole.num_bytes, *values), evaluation


def _seconds_per_token(whole: WholeModel, prompt: list[int]) -> float:
    """The least of three greedy generations, of 16 tokens behind a prompt.

    Raises: UsageError if it cannot generate, as a hybrid model cannot that has lost all of its attention
    """
    count = min(_NEW_TOKENS, (context_length_of(whole.model) or 2**31) - len(prompt))
    last, seconds = vocab_size_of(whole.model) - 1, []  # a stop that hardly comes
    for _ in range(3):
        start = time.perf_counter()
        try:
            (found,) = generate(whole.model, [prompt], stop_token_ids=[last], max_new_tokens=[count])
        except (ValueError, LookupError, AttributeError) as error:
            reason = str(error).partition("\n")[0]
            raise UsageError(f"{whole.title}: it cannot generate with a cache ({reason}); make another cut") from None
        seconds.append((time.perf_counter() - start) / (len(found.ids) + (found.stop is not None)))
    return min(seconds)


def _compare_with_chance(evaluation: Evaluation, calibration: Dataset, held_out: Dataset) -> list[str]:
    """A warning if the model is no better than one that knows only how often each token is.

    loss = -mean over the held-out tokens of log (c + 1) / (N + V), c: how often the token is among the N of the text
    """
    known, targets = (data.text.student.ids[data.text.student.is_target] for data in (calibration, held_out))
    counts = np.bincount(known, minlength=calibration.pair.student_vocab_size)
    loss = np.log(counts.sum() + len(counts)) - np.log(counts[targets] + 1).mean()
    if evaluation.loss < loss:
        return []
    return [
        f"Warning: the cut has left the model at chance: {evaluation.loss:.2f} nats a token, and {loss:.2f} for how "
        "often each token is; cut less, or distil it for long"
    ]


@contextlib.contextmanager
def _written_aside(folder: Path) -> Iterator[Path]:
    """A folder to write into, which gets its name once all is in it; after an error nothing is left. Where there is a
    folder of that name, of earlier rounds, its files go there.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        if folder.exists():
            for path in sorted(partial.iterdir()):
                atomic_rename(path, folder / path.name)
        else:
            atomic_rename(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _report(shrunk: Shrunk, folder: Path, config: ShrinkingConfig) -> None:
    if config.output.json:
        print(json.dumps(json_safe({**dataclasses.asdict(shrunk), "output_dir": str(folder)}), indent=2))
        return
    for line in (*shrunk.table(), *shrunk.warnings):
        print(line)
    print(f"Written: {folder}, with README.md and {PAGE}")
    if shrunk.healed:
        print(f"Distilled: {healed_student(folder)}")
        print(f"Next: {program_name()} generate {folder / HEALING}")
    elif not config.shrink.heal_steps:
        print(f"Next: {program_name()} train --teacher_model {shrunk.model} --student_model {folder}")
