"""What a run reads, as digests in its checkpoints: a resumed run that would read something else is refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from torch import nn

from sar_kd.config.command_line import MAY_CHANGE_ON_RESUME
from sar_kd.config.config_file import options_in
from sar_kd.config.fields import RunConfig
from sar_kd.config.sections import SELF
from sar_kd.data.files.sources import Documents, digest_of
from sar_kd.data.teacher_prompt import read_prompt
from sar_kd.errors import UsageError
from sar_kd.models.loading import Models
from sar_kd.models.model_files import IN_MEMORY
from sar_kd.runtime.distributed import SINGLE_PROCESS, ProcessGroup
from sar_kd.teacher.cache.format import read_header
from sar_kd.teacher.cached import model_fingerprint
from sar_kd.teacher.moe.router_checkpoint import hash_tensors
from sar_kd.tokenization.token_table import fingerprint

_SET_BY_SAVING = {"architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path"}


def digest_inputs(
    config: RunConfig,
    documents: tuple[Documents, Documents],
    models: Models,
    process_group: ProcessGroup = SINGLE_PROCESS,
) -> dict[str, str]:
    """Digests of settings, text, tokenizers and models' files (a commit, for a model of the hub), by what they are of.

    The settings are compared because `config.json` can be edited, and a checkpoint can be one of another run.

    A student whose weights are all trained is compared by its configuration: the checkpoint has its weights.
    """
    return process_group.broadcast(process_group.on_rank_zero(lambda: _digests(config, documents, models))) or {}


def _digests(config: RunConfig, documents: tuple[Documents, Documents], models: Models) -> dict[str, str]:
    train, validation = documents
    settings = options_in(config.to_dict())
    found = {"config.json": _digest({name: settings[name] for name in settings.keys() - MAY_CHANGE_ON_RESUME})}
    found |= {"the training text": digest_of(train), "the held-out text": digest_of(validation)}
    tokenizers = models.tokenizers
    found["the student's tokenizer"] = fingerprint(tokenizers.student)
    found["the student's files"] = _digest_model(config, "student_model", models.student)
    if tokenizers.teacher is not tokenizers.student:
        found["the teacher's tokenizer"] = fingerprint(tokenizers.teacher)
    if prompt := getattr(config.models, "teacher_system_prompt", ""):
        found["the teacher's prompt"] = _digest({"text": read_prompt(prompt)})
    if models.teacher is not None and config.models.teacher_model != SELF:
        found["the teacher's files"] = _digest_model(config, "teacher_model", models.teacher)
    elif cache := getattr(config.models, "teacher_cache", ""):
        found["the teacher cache"] = _digest(read_header(Path(cache)))
    return found


def _digest_model(config: RunConfig, option: str, model: nn.Module) -> str:
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    name, in_checkpoint = getattr(config.models, option), len(trained) == len(list(model.parameters()))
    if name.startswith(IN_MEMORY):
        settings: Any = model.config
        frozen = {name: tensor for name, tensor in model.state_dict().items() if name not in trained}
        return _digest(_of_model(settings)) if in_checkpoint else hash_tensors(frozen)
    found = model_fingerprint(name, config.models.trust_remote_code, option)
    weights = {file for file in found if file.endswith((".safetensors", ".bin", ".gguf"))}
    return _digest({file: value for file, value in found.items() if not (in_checkpoint and file in weights)})


def _of_model(settings: Any) -> dict:
    """The settings of a model in memory, without those that saving it sets."""
    return {name: value for name, value in settings.to_dict().items() if name not in _SET_BY_SAVING}


def _digest(values: dict) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def check_inputs(saved: dict[str, str], found: dict[str, str], allow_changes: bool) -> list[str]:
    """Compare the inputs of a resumed run with those of its checkpoint; lines about what differs and is allowed to.

    Raises: UsageError naming what has changed
    """
    if not saved:
        return ["The checkpoint holds no digests of text, tokenizers and models: whether they changed is not known"]
    changed = [what for what in {**saved, **found} if saved.get(what) != found.get(what)]
    if not changed:
        return []
    what = f"{', '.join(changed)} changed since the run began"
    if not allow_changes:
        raise UsageError(f"--resume: {what}; put back what was there, or go on with --allow_changed_inputs")
    return [f"--allow_changed_inputs: {what}; from here on the run reads what is there now"]
