"""The layout of the design, read out of the sources with `ast`: what may import, print, catch and name what."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = ("train_sar_kd_fp16_safe", "train_sar_kd_stable")
LEVELS = {
    -2: {"farewell", "settings", "terminal", "version"},
    -1: {
        "routing_config",
        "on_policy_config",
        "memory_config",
        "presets",
        "world",
        "parsers",
        "environment",
        "lora",
        "units",
        "writing",
    },
    0: {
        "config",
        "embedded",
        "guards",
        "losses",
        "divergence",
        "token_bytes",
        "interruption",
        "hub",
        "reading",
        "prefetch",
        "hollow",
        "offload",
    },
    1: {
        "arguments",
        "routers",
        "tokens",
        "columns",
        "rows",
        "precision",
        "optim",
        "folder",
        "files",
        "layers",
        "training_log",
        "cache_config",
        "fold",
    },
    2: {
        "alignment",
        "heads",
        "projection",
        "other_ways",
        "history",
        "trackers",
        "token_stream",
        "pieces",
        "text_files",
        "shelf",
        "sft_config",
        "explain",
        "top",
        "teacher_store",
        "quantised",
        "loading",
    },
    3: {
        "readout",
        "models",
        "conversation",
        "vocabulary",
        "stretches",
        "routing",
        "router_update",
        "blocks",
        "documents",
        "fragments",
        "token_cache",
        "writing_memory",
    },
    4: {"moments", "subject", "router_table", "router_terms", "streams", "tiled", "charts", "verdict", "card", "heard"},
    5: {"pairing", "report", "generate", "matching", "windows", "likelihood"},
    6: {"data", "wording", "teacher_cache"},
    7: {"distillation", "evaluate", "metrics", "responses", "cache_text"},
    8: {"projected", "progress", "clamps", "coverage", "forensics", "sft_log", "benchmark", "cache", "pretended"},
    9: {"kinds", "placement", "router_watch", "audit"},
    10: {"objective"},
    11: {"router_learner", "several_devices", "rehearsal"},
    12: {"step", "teacher_routing", "no_teacher", "memory_plan"},
    13: {"checkpoint", "recovery", "companion", "stored_teaching", "batch_size"},
    14: {"on_policy", "preflight"},
    15: {"feed"},
    16: {"trainer", "vitals", "exam"},
    17: {"cli", "embedded.build", "supervised"},
    18: {"tasks"},
    19: {"train", *SCRIPTS},
    20: {"__main__", "api"},
    21: {"sar_kd"},
}  # fmt: skip
LEVEL_OF = {name: level for level, names in LEVELS.items() for name in names}


def _name_of(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__").removeprefix("sar_kd.")


PATHS = {_name_of(path): path for path in [*sorted(ROOT.glob("sar_kd/**/*.py")), *sorted(ROOT.glob("train_*.py"))]}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in PATHS.items()}
EVERY_MODULE = pytest.mark.parametrize("module", sorted(TREES))


def _imported(tree: ast.Module) -> set[str]:
    """Dotted names of every import, wherever it stands; `from sar_kd import x` is `sar_kd.x`."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            whole_package = node.module == "sar_kd"
            names |= (
                {f"sar_kd.{alias.name}" for alias in node.names} if whole_package else {"." * node.level + node.module}
            )
    return names


def _siblings(module: str) -> set[str]:
    return {name.removeprefix("sar_kd.") for name in _imported(TREES[module]) if name.split(".")[0] == "sar_kd"}


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
    return {name for name, tree in TREES.items() if predicate(tree)}


def _imports(package: str):
    return lambda tree: package in {name.split(".")[0] for name in _imported(tree)}


def test_every_module_has_a_level():
    assert set(TREES) == set(LEVEL_OF)


@EVERY_MODULE
def test_imports_point_strictly_down(module):
    upward = {name for name in _siblings(module) if LEVEL_OF[name] >= LEVEL_OF[module]}
    assert not upward


@EVERY_MODULE
def test_imports_are_absolute(module):
    assert not [name for name in _imported(TREES[module]) if name.startswith(".")]


@pytest.mark.parametrize("module", sorted(LEVELS[-2] | LEVELS[0] - {"config"}))
def test_the_lowest_level_imports_no_sibling(module):
    assert not _siblings(module)


def test_cli_knows_errors_only():
    assert _siblings("cli") == {"config", "guards", "world"}


@pytest.mark.parametrize("module", ["config", "guards", "interruption", "embedded", "arguments", "parsers", "__main__"])
def test_parsing_and_judging_need_no_package_but_the_standard_library(module):
    outside = {name.split(".")[0] for name in _imported(TREES[module])} - set(sys.stdlib_module_names) - {"sar_kd"}
    # The embedded text's first half is a module that CPython ships and its list of modules leaves out.
    assert outside <= {"pydoc_data"}


def test_only_loading_the_layers_their_rounding_and_the_builder_import_transformers():
    assert _modules_that(_imports("transformers")) == {"loading", "layers", "quantised", "embedded.build"}


def test_only_the_parsers_and_the_builder_import_argparse():
    assert _modules_that(_imports("argparse")) == {"parsers", "embedded.build"}


def test_only_precision_names_autocast_and_grad_scaler():
    def names_them(tree):
        names = _code_names(tree) | _imported(tree)
        return any(
            name.startswith(("torch.amp", "torch.cuda.amp", "torch.autocast")) or "GradScaler" in name.split(".")
            for name in names
        )

    assert _modules_that(names_them) == {"precision"}


def test_minus_100_is_written_once():
    def is_minus_100(node):
        return (
            isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and getattr(node.operand, "value", 0) == 100
        )

    found = [name for name, tree in TREES.items() for node in ast.walk(tree) if is_minus_100(node)]
    assert found == ["losses"]


def test_only_these_modules_write_to_the_terminal():
    def prints(tree):
        names = _code_names(tree)
        return (
            "print" in names
            or "tqdm" in names
            or any(name.endswith(("stdout.write", "stderr.write")) for name in names)
        )

    verbs = {"audit", "forensics", "router_table", "embedded.build", "preflight", "report", "generate", "explain"}
    verbs |= {"cache", "teacher_cache"}  # the latter a bar, while a cache is checked
    printing = {"metrics", "cli", "__main__", "reading", "benchmark", *verbs}
    assert _modules_that(prints) <= printing


@EVERY_MODULE
def test_no_module_exceeds_300_lines(module):
    assert len(PATHS[module].read_text(encoding="utf-8").splitlines()) <= 300


def test_one_call_on_the_way_of_a_step_waits_for_the_device():
    """What a step calls, by name; that no other call waits either is measured in test_step.py."""
    waits = {"item", "tolist", "numpy", "cpu", "nonzero", "is_nonzero", "equal", "unique", "masked_select"}
    found = [
        (module, _dotted(node.func) or node.func.attr)
        for module in ("step", "objective", "distillation", "projection", "losses", "precision", "guards", "optim")
        for node in ast.walk(TREES[module])
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in waits
    ]
    # The label shift runs in the collator.
    assert sorted(found) == [("losses", "nonzero"), ("step", "tolist")]


def test_the_verb_trains_line_for_line_as_the_scripts_do():
    def statements(module, function):
        (definition,) = (node for node in TREES[module].body if getattr(node, "name", None) == function)
        return [ast.unparse(statement) for statement in definition.body if not isinstance(statement, ast.Expr)]

    of_script = [line for line in statements(SCRIPTS[1], "main") if "agreed" not in line]
    assert [line.replace(", given)", ")") for line in statements("train", "train") if "agreed" not in line] == of_script


def test_the_scripts_differ_in_their_preset_only():
    bodies = []
    for script, preset in zip(SCRIPTS, ("FP16_SAFE", "STABLE"), strict=True):
        source = PATHS[script].read_text(encoding="utf-8")
        docstring = TREES[script].body[0]
        body = source.splitlines()[docstring.end_lineno :]
        assert sum(preset in line for line in body) == 2  # imported once, used once
        bodies.append([line.replace(preset, "PRESET") for line in body])
    assert bodies[0] == bodies[1]


@EVERY_MODULE
def test_no_error_is_caught_wholesale(module):
    handlers = [node for node in ast.walk(TREES[module]) if isinstance(node, ast.ExceptHandler)]
    caught = [name for handler in handlers for name in _caught(handler)]
    assert not {"", "Exception", "BaseException"} & set(caught)


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

    assert _modules_that(asks) <= {"arguments"}
