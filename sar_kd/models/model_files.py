"""Where a model's files are, and what they show before anything is built from them.

A folder in Hugging Face format, a GGUF file, an adapter beside its base model, or a hub id. What the files of a folder
say is checked first, because a config of a million layers would take hours to be built.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
from torch import nn

from sar_kd import embedded
from sar_kd.config.installation import program_name
from sar_kd.config.sections import EMBEDDED
from sar_kd.errors import UsageError
from sar_kd.runtime.environment import is_installed
from sar_kd.runtime.run_folder import holds_run, saved_student

IN_MEMORY = "(in memory)"
"""Begins the name of a model that was handed over in Python."""

ADAPTER_CONFIG = "adapter_config.json"

_EMBEDDED_DIRS = {
    "teacher_model": embedded.TEACHER_DIR,
    "student_model": embedded.STUDENT_DIR,
    "model": embedded.TEACHER_DIR,
    "teacher_tokenizer": embedded.TEACHER_DIR,
}

_SIZES = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "max_position_embeddings", "n_layer", "n_embd", "n_head", "n_positions",
)  # fmt: skip
"""Numbers of a config that are at least 1"""

_WIDTHS = ("vocab_size", "hidden_size", "n_embd", "intermediate_size", "head_dim")
"""Numbers of a config that shapes of weights show"""

_MAX_LAYERS = 2000
"""Most layers of a model whose weights are not here to be counted"""

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model*.bin.index.json")

_TOKENIZERS = ("*token*", "vocab*", "*.model", "*.tiktoken", "tekken.json")


@dataclass(frozen=True)
class ModelFiles:
    """The files of one model."""

    title: str
    """The option and its value, with which an error begins"""
    location: str
    """A folder or a hub id"""
    gguf_file: str = ""
    """A file of the folder that holds config, tokenizer and weights"""
    adapter: str = ""
    """The folder of an adapter, to be merged into the model; '' if there is none"""

    @property
    def folder(self) -> Path | None:
        """None for a model on the hub."""
        path = Path(self.location)
        return path if path.is_dir() else None

    @property
    def arguments(self) -> dict[str, str]:
        """Further arguments of transformers' `from_pretrained`."""
        return {"gguf_file": self.gguf_file} if self.gguf_file else {}

    @property
    def conversion(self) -> str:
        """What is made of the files before the model is used, in words; '' if nothing."""
        words = [f"the weights of {self.gguf_file} dequantized"] if self.gguf_file else []
        words += [f"the adapter merged into {self.location}"] if self.adapter else []
        return ", ".join(words)

    def with_tokenizer(self) -> ModelFiles:
        """Where the tokenizer is: an adapter's folder, if it has one, else the model's."""
        has_own = bool(self.adapter) and _has_any(Path(self.adapter), _TOKENIZERS)
        return ModelFiles(self.title, self.adapter) if has_own else self


def find_model(option: str, name: str, title: str = "") -> ModelFiles:
    """The files of the model that an option names.

    title: what an error begins with, where it is not the option
    Raises: UsageError if there is no such folder or file, or one that holds no single model
    """
    title = title or f"--{option} {name}"
    if name == EMBEDDED:
        if not _EMBEDDED_DIRS[option].is_dir():
            raise UsageError(
                f"{title}: not in this installation; make it with "
                f"`{program_name()} embedded --output_dir {_EMBEDDED_DIRS[option].parent}`"
            )
        return ModelFiles(title, str(_EMBEDDED_DIRS[option]))
    if name.startswith(IN_MEMORY):
        raise UsageError(f"{title}: was handed over in Python; continue there, with the same model")
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise UsageError(f"{title}: is a file; give the folder that it is in, or a .gguf file")
        return _gguf(title, path)
    if path.is_dir():
        return _find_in_folder(title, path)
    if name.startswith((".", "/", "~")) or path.suffix == ".gguf":
        raise UsageError(f"{title}: no such {'file' if path.suffix == '.gguf' else 'directory'}")
    return ModelFiles(title, name)


def is_local(name: str) -> bool:
    """Does the name stand for a folder or a file of this machine?"""
    return Path(name).expanduser().exists()


def _find_in_folder(title: str, folder: Path) -> ModelFiles:
    if holds_run(folder) and (student := saved_student(folder)).is_dir():
        raise UsageError(f"{title}: is the folder of a run; give the student in it, {student}")
    has_config, has_adapter = ((folder / name).is_file() for name in ("config.json", ADAPTER_CONFIG))
    if has_config and has_adapter:
        raise UsageError(
            f"{title}: holds a whole model and an adapter ({ADAPTER_CONFIG}); delete the adapter, or move it into a "
            "folder of its own and give that folder, to use the model with it"
        )
    if has_adapter:
        return _adapter(title, folder)
    if not has_config or not _has_any(folder, _WEIGHTS):  # some keep a config.json beside GGUF files
        found = sorted(path.name for path in folder.glob("*.gguf"))
        if not found and not has_config:
            raise UsageError(f"{title}: cannot be loaded (no config.json in it)")
        if len(found) > 1:
            raise UsageError(f"{title}: holds {len(found)} GGUF files; give one of them: {', '.join(found[:5])}")
        if found:
            return _gguf(title, folder / found[0])
    return ModelFiles(title, str(folder))


def _gguf(title: str, path: Path) -> ModelFiles:
    if not is_installed("gguf"):
        raise UsageError(f"{title}: a GGUF file needs `pip install gguf sentencepiece protobuf`")
    return ModelFiles(title, str(path.parent), gguf_file=path.name)


def _adapter(title: str, folder: Path) -> ModelFiles:
    if not is_installed("peft"):
        raise UsageError(f"{title}: an adapter needs `pip install peft`")
    base = _read_json(title, folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UsageError(f"{title}: {ADAPTER_CONFIG} names no base model (base_model_name_or_path); add it there")
    path = Path(base).expanduser()
    if (path / ADAPTER_CONFIG).is_file() and not (path / "config.json").is_file():
        raise UsageError(f"{title}: its base model {base} is an adapter too; merge that one first")
    files = find_model("", base, f"{title}: its base model {base}")
    return ModelFiles(title, files.location, files.gguf_file, str(folder))


def check_files(files: ModelFiles) -> None:
    """Check what the small files of a folder say, before anything is built from it.

    Raises: UsageError naming the file, and the entry that cannot be
    """
    folder = files.folder
    if folder is None or files.gguf_file:
        if folder is not None:
            _num_tensors(files)
        return
    config = _read_json(files.title, folder / "config.json")
    for name in ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        if (folder / name).is_file():
            _read_json(files.title, folder / name)
    num_tensors = None
    text_config = config.get("text_config")
    for part in (config, text_config if isinstance(text_config, dict) else {}):
        for name in _SIZES:
            value = part.get(name)
            if isinstance(value, (str, float, bool)) or (isinstance(value, int) and value < 1):
                raise UsageError(
                    f"{files.title}: {name} in config.json is {value!r}, which has to be a whole number of at least 1"
                )
            if name in ("num_hidden_layers", "n_layer") and isinstance(value, int):
                num_tensors = _num_tensors(files) if num_tensors is None else num_tensors
                if value > (num_tensors or _MAX_LAYERS):
                    has = f"its weights are {num_tensors:,} tensors" if num_tensors else "no model has as many"
                    raise UsageError(f"{files.title}: {name} in config.json is {value:,}, and {has}")


def check_num_tokens(files: ModelFiles, vocab_size: int) -> None:
    """Raise UsageError if the tokenizer adds more tokens than the model has ids: to read them could take hours."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        path = Path(files.location) / name
        if path.is_file() and (count := path.read_bytes().count(b'"single_word"')) > max(1000, vocab_size):
            raise UsageError(f"{files.title}: {name} adds {count:,} tokens, and the model has {vocab_size:,} ids")


def require_weights(files: ModelFiles) -> None:
    """Raise UsageError if a folder holds no file of weights."""
    if files.folder is not None and not files.gguf_file and not _has_any(files.folder, _WEIGHTS):
        raise UsageError(f"{files.title}: holds no weights (model.safetensors); copy them into it")


def require_tokenizer(files: ModelFiles) -> None:
    """Raise UsageError if a folder holds no file of a tokenizer."""
    if files.folder is not None and not files.gguf_file and not _has_any(files.folder, _TOKENIZERS):
        raise no_tokenizer(files.title)


def no_tokenizer(title: str) -> UsageError:
    """The error for a model without a tokenizer."""
    remedy = "copy the tokenizer files of the model that it was trained from into it"
    return UsageError(f"{title}: has no tokenizer (no tokenizer.json or tokenizer.model); {remedy}")


def check_shapes(files: ModelFiles, model: nn.Module) -> None:
    """Compare the tensors of a model, which may be on the meta device, with those that its weights file states.

    Only tensors of the same name: a file may name some otherwise, and transformers converts them.
    Raises: UsageError naming a tensor of another size
    """
    if files.gguf_file or files.adapter or getattr(model.config, "quantization_config", None) is not None:
        return
    stated = _read_shapes(files) if files.folder is not None else {}
    for name, tensor in model.state_dict().items():
        shape = tuple(tensor.shape)
        if sorted(stated.get(name, shape)) != sorted(shape):
            raise size_error(files, model.config, name, shape, stated[name])


def size_error(files: ModelFiles, config: Any, name: str, wanted: Sequence[int], found: Sequence[int]) -> UsageError:
    """The error for a weight whose shape is not the one that follows from the config; wanted: that one"""
    text_config = config.get_text_config()
    entries = ((key, getattr(text_config, key, None)) for key in _WIDTHS)
    stated = next((f", where {key} is {value}" for key, value in entries if value in {*wanted} - {*found}), "")
    return UsageError(
        f"{files.title}: config.json and weights do not belong together: {name} is {list(found)} in the weights and "
        f"{list(wanted)} by config.json{stated}; put back the config.json that these weights were saved with"
    )


def _has_any(folder: Path, patterns: tuple[str, ...]) -> bool:
    return any(True for pattern in patterns for _ in folder.glob(pattern))


def _read_json(title: str, path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise UsageError(f"{title}: {path.name} is damaged ({str(error).splitlines()[0]})") from None
    if not isinstance(content, dict):
        raise UsageError(f"{title}: {path.name} is damaged (it holds no object)")
    return content


def _num_tensors(files: ModelFiles) -> int:
    """Tensors in a folder's weights; 0 if their number is unknown."""
    if not files.gguf_file:
        return len(_read_shapes(files))
    with open(Path(files.location) / files.gguf_file, "rb") as file:
        header = file.read(16)
    if len(header) < 16 or header[:4] != b"GGUF":
        raise UsageError(f"{files.title}: {files.gguf_file} is damaged (it does not begin as a GGUF file)")
    return struct.unpack("<Q", header[8:])[0]


def _read_shapes(files: ModelFiles) -> Mapping[str, tuple[int, ...]]:
    """The shape of every tensor in the safetensors files of a folder, by name, from their headers."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in _safetensors_files(files):
        try:
            with safetensors.safe_open(path, "pt") as file:
                shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except (OSError, safetensors.SafetensorError) as error:
            raise UsageError(f"{files.title}: {path.name} is damaged ({str(error).splitlines()[0]})") from None
    return shapes


def _safetensors_files(files: ModelFiles) -> Iterator[Path]:
    folder = Path(files.location)
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        yield whole
    elif index.is_file():
        weight_map = _read_json(files.title, index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise UsageError(f"{files.title}: {index.name} is damaged (it has no weight_map)")
        for name in sorted(set(map(str, weight_map.values()))):
            if not (folder / name).is_file():
                raise UsageError(f"{files.title}: {name} is missing, which {index.name} names")
            yield folder / name
