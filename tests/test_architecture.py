"""The layout of the package, read out of the sources with `ast`: what may import, print, catch and name what."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = (
    "errors", "version", "embedded", "config", "runtime", "tokenization", "alignment",
    ("data", "models", "reporting"), "losses", "evaluation", "teacher", "preflight", "training", "commands", "api",
)  # fmt: skip
"""A package imports only what stands left of it; those of one tuple do not import one another."""
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in ((names,) if isinstance(names, str) else names)}
SCRIPTS = ("train_sar_kd_fp16_safe", "train_sar_kd_stable")


def _name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


PATHS = {_name_of(path): path for path in [*sorted(ROOT.glob("sar_kd/**/*.py")), *sorted(ROOT.glob("train_*.py"))]}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in PATHS.items()}
EVERY_MODULE = pytest.mark.parametrize("module", sorted(TREES))


def _imported(tree: ast.Module) -> set[str]:
    """Dotted names of every import, wherever it stands; `from a import b` is `a.b`."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {"." * node.level + f"{node.module or ''}.{alias.name}" for alias in node.names}
    return names


def _siblings(module: str) -> set[str]:
    """Modules and packages of ours that a module imports."""
    found = set()
    for name in _imported(TREES[module]):
        if name.split(".")[0] == "sar_kd":
            found.add(name if name in TREES else name.rpartition(".")[0])
    return found


def _package(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def _dotted(node: ast.AST) -> str:
    """`a.b.c` of an attribute chain; "" for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    base = _dotted(node.value) if isinstance(node, ast.Attribute) else ""
    return f"{base}.{node.attr}" if base else ""


def _code_names(tree: ast.Module) -> set[str]:
    """Every name and attribute chain of the code; docstrings and comments are not code."""
    return {_dotted(node) for node in ast.walk(tree) if isinstance(node, (ast.Name, ast.Attribute))}


def _modules_that(predicate) -> set[str]:
    return {name.removeprefix("sar_kd.") for name, tree in TREES.items() if predicate(tree)}


def _imports(package: str):
    return lambda tree: package in {name.split(".")[0] for name in _imported(tree)}


@pytest.mark.parametrize("module", sorted(set(TREES) - {"sar_kd", "sar_kd.__main__", *SCRIPTS}))
def test_a_package_imports_only_what_stands_left_of_it(module):
    own = _package(module)
    others = {_package(name) for name in _siblings(module)} - {own, ""}
    assert not {name for name in others if RANK[name] >= RANK[own]}


def test_no_module_is_imported_in_a_circle():
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for name in _siblings(module):
                visit(name, (*path, module))
            done.add(module)

    for module in TREES:
        visit(module, ())


@EVERY_MODULE
def test_imports_are_absolute(module):
    assert not [name for name in _imported(TREES[module]) if name.startswith(".")]


@pytest.mark.parametrize("module", sorted(name for name in TREES if PATHS[name].name == "__init__.py"))
def test_a_package_says_what_it_takes_in_and_gives_out_and_defines_nothing(module):
    assert len(ast.get_docstring(TREES[module]).splitlines()) >= 3
    if module not in ("sar_kd", "sar_kd.embedded"):
        assert len(TREES[module].body) == 1


@pytest.mark.parametrize(
    "module", sorted(name for name in TREES if _package(name) in ("errors", "version", "embedded", "config"))
)
def test_settings_need_no_package_but_the_standard_library(module):
    outside = {name.split(".")[0] for name in _imported(TREES[module])} - set(sys.stdlib_module_names) - {"sar_kd"}
    # The embedded text's first half is a module that CPython ships and its list of modules leaves out; numpy finds what
    # its documents share. A .yaml file of options is read by the package that transformers brings.
    allowed = {"sar_kd.config.config_file": {"yaml"}, "sar_kd.embedded": {"pydoc_data", "numpy"}}
    assert outside <= allowed.get(module, set())


def test_the_guards_need_no_torch():
    outside = {name.split(".")[0] for name in _imported(TREES["sar_kd.training.guards"])}
    assert outside <= set(sys.stdlib_module_names) | {"sar_kd"}


def test_only_models_and_the_builder_import_transformers():
    found = _modules_that(_imports("transformers"))
    assert {name for name in found if not name.startswith("models.")} == {"commands.build_embedded"}


def test_only_the_parser_of_options_imports_argparse():
    assert _modules_that(_imports("argparse")) == {"config.option_parser"}


def test_only_precision_names_autocast_and_grad_scaler():
    def names_them(tree):
        names = _code_names(tree) | _imported(tree)
        return any(
            name.startswith(("torch.amp", "torch.cuda.amp", "torch.autocast")) or "GradScaler" in name.split(".")
            for name in names
        )

    assert _modules_that(names_them) == {"runtime.precision"}


def test_minus_100_is_written_once():
    def is_minus_100(node):
        return (
            isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and getattr(node.operand, "value", 0) == 100
        )

    found = [name for name, tree in TREES.items() for node in ast.walk(tree) if is_minus_100(node)]
    assert found == ["sar_kd.data.batch"]


def test_only_these_modules_write_to_the_terminal():
    def prints(tree):
        names = _code_names(tree)
        return (
            "print" in names
            or "tqdm" in names
            or any(name.endswith(("stdout.write", "stderr.write")) for name in names)
        )

    found = {name for name in _modules_that(prints) if not name.startswith("commands.")}
    # A bar each: while questions are answered, while a cache is checked.
    bars = {"evaluation.question_answering", "teacher.cached"}
    assert found <= {"reporting.run_log", "runtime.console", "api", *bars}


@EVERY_MODULE
def test_no_module_exceeds_400_lines(module):
    assert len(PATHS[module].read_text(encoding="utf-8").splitlines()) <= 400


def test_one_call_on_the_way_of_a_step_waits_for_the_device():
    """What a step calls, by name; that no other call waits either is measured in test_step.py."""
    waits = {"item", "tolist", "numpy", "cpu", "nonzero", "is_nonzero", "equal", "unique", "masked_select"}
    on_the_way = (
        "training.step", "losses.objective", "losses.distillation", "losses.functional", "losses.tiled_loss",
        "losses.divergence", "losses.projection.marginals", "losses.projection.loss", "runtime.precision",
        "training.guards", "training.optimizer",
    )  # fmt: skip
    found = [
        (module, _dotted(node.func) or node.func.attr)
        for module in on_the_way
        for node in ast.walk(TREES[f"sar_kd.{module}"])
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in waits
    ]
    assert found == [("training.step", "tolist")]


@pytest.mark.parametrize(("script", "preset"), zip(SCRIPTS, ("FP16_SAFE", "STABLE"), strict=True))
def test_a_script_names_its_preset_and_nothing_else(script, preset):
    lines = PATHS[script].read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 20
    assert sum(preset in line for line in lines) == 2  # imported once, used once


# What a drawing library raises must not end a run.
MAY_CATCH_ALL = {"sar_kd.data.chat.templates", "sar_kd.reporting.run_log"}


@pytest.mark.parametrize("module", sorted(TREES.keys() - MAY_CATCH_ALL))
def test_no_error_is_caught_wholesale(module):
    handlers = [node for node in ast.walk(TREES[module]) if isinstance(node, ast.ExceptHandler)]
    caught = [name for handler in handlers for name in _caught(handler)]
    # What transformers, tokenizers and peft raise for a damaged file is not known; nothing is computed there.
    reads_files_of_others = module in ("sar_kd.models.pretrained", "sar_kd.tokenization.backends")
    assert reads_files_of_others or not {"", "Exception", "BaseException"} & set(caught)


def _caught(handler: ast.ExceptHandler) -> list[str]:
    if handler.type is None:
        return [""]
    return [_dotted(kind) for kind in getattr(handler.type, "elts", [handler.type])]


@EVERY_MODULE
def test_no_number_is_repaired(module):
    assert not [name for name in _code_names(TREES[module]) if name.split(".")[-1] in ("nan_to_num", "nan_to_num_")]


@EVERY_MODULE
def test_every_module_says_what_it_is_for(module):
    assert ast.get_docstring(TREES[module])


@pytest.mark.parametrize("module", sorted(set(TREES) - set(SCRIPTS)))
def test_every_public_function_and_class_has_a_docstring(module):
    definitions = [
        node for node in TREES[module].body if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name[0] != "_"
    ]
    assert not [node.name for node in definitions if not ast.get_docstring(node)]


def test_no_other_code_asks_for_the_mode():
    def asks(tree):
        return any(
            isinstance(node, ast.Compare)
            and any(_dotted(side).split(".")[-1] == "mode" for side in [node.left, *node.comparators])
            for node in ast.walk(tree)
        )

    assert _modules_that(asks) <= {"config.command_line"}
