"""`sar-kd export`: the student of a run as a GGUF file with an Ollama Modelfile, or uploaded to the hub."""

from __future__ import annotations

from pathlib import Path

import torch

from sar_kd.commands.hand_over import push_student
from sar_kd.config.exporting import ExportConfig
from sar_kd.data.chat.ollama import modelfile
from sar_kd.errors import UsageError
from sar_kd.models.gguf.check import check_gguf
from sar_kd.models.gguf.export import find_converter, find_quantizer, write_gguf
from sar_kd.models.loading import load_for_generation
from sar_kd.models.model_checks import stop_ids_of, vocab_size_of
from sar_kd.models.saved_weights import require_fits
from sar_kd.reporting.summary_file import amend_summary
from sar_kd.runtime.console import format_bytes
from sar_kd.runtime.files import atomic_rename, atomic_write, require_disk_space
from sar_kd.runtime.hub import require_upload
from sar_kd.runtime.run_folder import EXPORTS, holds_run, saved_student


def main(config: ExportConfig) -> dict:
    """Write the file, then upload. Raises: UsageError for what the user can mend; a file that fails its check is not
    left
    """
    run = Path(config.run).expanduser()
    student = _student_of(run)
    if config.push_to_hub:
        require_upload(config.push_to_hub)  # before the conversion, which takes minutes
    if config.gguf:
        _write_gguf(config, run, student)
    if config.push_to_hub:
        url = push_student(run, student, config.push_to_hub, config.public)
        if holds_run(run):
            amend_summary(run, {"hub_url": url})
    return {"status": "finished"}


def _write_gguf(config: ExportConfig, run: Path, student: Path) -> None:
    if not (student / "config.json").is_file():
        raise UsageError(f"--gguf: {student} is an adapter; merge it first: a run without --adapter_only does")
    path, kind = _output(config, run), config.quantize
    converter = find_converter(config.converter, student, kind)
    quantizer = find_quantizer() if kind == "q4_k_m" else ""
    model, tokenizer = load_for_generation("model", str(student), False, title=f"export {student}")
    if kind == "float16":
        for name, weight in model.state_dict().items():
            if weight.dim() > 1:  # vectors stay float32
                require_fits(f"--quantize {kind}", name, weight, torch.float16)
    path.parent.mkdir(parents=True, exist_ok=True)
    num_bytes = 4 * sum(weight.numel() for weight in model.parameters())
    require_disk_space(path.parent, (2 if quantizer else 1) * num_bytes, path.name, option="output", remedy="free some")
    print(f"Converting {student} to {kind}, by {converter.name}")
    partial = path.with_name(f".{path.name}.partial.gguf")
    try:
        for line in write_gguf(student, partial, kind, converter, quantizer, vocab_size_of(model)):
            print(line)
        check = check_gguf(partial, path.name, kind, model, tokenizer)
        atomic_rename(partial, path)
    finally:
        partial.unlink(missing_ok=True)
        if path.parent.name == EXPORTS and not any(path.parent.iterdir()):
            path.parent.rmdir()
    print(f"Written: {path}, {format_bytes(path.stat().st_size)}")
    print(check.line(kind))
    text, said = modelfile(path.name, tokenizer, stop_ids_of(f"export {student}", model))
    atomic_write(_modelfile_of(path), text, "output", "name another folder")
    print(f"Written: {_modelfile_of(path)}, with {said}")
    print(f"Next: ollama create {path.stem} -f {_modelfile_of(path)}")


def _output(config: ExportConfig, run: Path) -> Path:
    if not (config.output or holds_run(run)):
        raise UsageError(f"export {run}: is no run; name the file with --output FILE.gguf")
    default = run / EXPORTS / f"{run.resolve().name}-{config.quantize}.gguf"
    path = Path(config.output).expanduser() if config.output else default
    for file in (path, _modelfile_of(path)):
        if file.exists() and not config.overwrite:
            raise UsageError(f"--output {file}: is there already; name another file, or give --overwrite")
    return path


def _modelfile_of(path: Path) -> Path:
    """Of each file its own, so that two of one run stay apart."""
    return path.with_suffix(".Modelfile")


def _student_of(folder: Path) -> Path:
    student = saved_student(folder) if holds_run(folder) else folder
    if not student.is_dir():
        reason = "its run has not saved a student yet" if holds_run(folder) else "no such directory"
        raise UsageError(f"export {folder}: {reason}")
    if not ((student / "config.json").is_file() or (student / "adapter_config.json").is_file()):
        raise UsageError(f"export {folder}: holds no run and no model (config.json is missing)")
    return student
