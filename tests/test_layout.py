"""Imports run one way: a room imports only rooms below it, and entry scripts are imported by none."""

import ast
import subprocess
import sys

import pytest
from helpers import REPO

SCRIPTS = {"finetune", "forget", "evaluate_util", "aggregate_eval_stat", "report"}
ROOMS = [  # each imports only what stands below it
    *("tofu.attacks", "tofu.training", "dataloader", "tofu.reporting", "tofu.cli", "tofu.evaluation", "tofu.methods"),
    *("tofu.models", "data_module", "tofu.runtime", "utils"),
]
FILES = [*REPO.glob("*.py"), *REPO.glob("tofu/**/*.py")]
LINES, FUNCTION_LINES, MAIN_STATEMENTS = 400, 60, 15


def name_of(path) -> str:
    """A file's dotted name: utils, tofu.models.loading."""
    return ".".join(path.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__")


def room_of(module: str) -> str | None:
    """The room that a module belongs to; None for an entry script, for the package itself and for a library's."""
    return next((room for room in ROOMS if module == room or module.startswith(f"{room}.")), None)


def imported(path) -> set[str]:
    """The modules of this repository that a file imports, also inside its functions."""
    names, ours = set(), {name_of(file) for file in FILES}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names} & ours or {node.module}
    return names & ours


def test_every_module_has_a_room():
    for path in FILES:
        name = name_of(path)
        assert name in SCRIPTS or name == "tofu" or room_of(name), f"{name} has no room"
    folders = {f"tofu.{path.name}" for path in (REPO / "tofu").iterdir() if (path / "__init__.py").is_file()}
    assert folders <= set(ROOMS)


def test_imports_run_one_way():
    for path in FILES:
        name = name_of(path)
        for other in imported(path) - {name}:
            assert other not in SCRIPTS, f"{name} imports the entry script {other}"
            above, below = room_of(name), room_of(other)
            fits = name in SCRIPTS or above == below or ROOMS.index(above) < ROOMS.index(below)
            assert fits, f"{name} imports {other}, whose room is not below its own"


def test_no_circle_within_a_room():
    uses = {name_of(path): imported(path) for path in FILES}

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"a circle: {' -> '.join((*trail, name))}"
        for other in uses[name] - {name}:
            visit(other, (*trail, name))

    for name in uses:
        visit(name, ())


def test_no_facade():
    """A package's own file holds its docstring alone: a name has one home."""
    for path in REPO.glob("tofu/**/__init__.py"):
        (only,) = ast.parse(path.read_text()).body
        assert isinstance(only, ast.Expr), path
    tops = {path.stem for path in REPO.glob("*.py")}
    assert not tops & {path.name for path in REPO.iterdir() if path.is_dir()}


def test_modules_and_functions_are_short():
    for path in FILES:
        text = path.read_text()
        assert len(text.splitlines()) <= LINES, f"{path.name} has more than {LINES} lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < FUNCTION_LINES, f"{path.name}: {node.name} is long"


def test_a_main_reads_as_a_story():
    tree = ast.parse((REPO / "forget.py").read_text())
    main = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    statements = [node for node in ast.walk(main) if isinstance(node, ast.stmt)][1:]  # but for the function itself
    docstring = 1
    assert len(statements) - docstring <= MAIN_STATEMENTS


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("tofu.cli.command_line", ("torch", "transformers", "datasets", "numpy", "scipy")),
        ("tofu.methods.losses", ("transformers", "datasets", "peft", "deepspeed", "accelerate", "hydra")),
        ("tofu.evaluation.metrics.tofu", ("torch", "transformers", "datasets", "hydra", "scipy")),
        ("tofu.evaluation.metrics.table", ("torch", "transformers", "datasets", "hydra", "scipy", "nltk")),
        ("tofu.evaluation.evaluator", ("peft", "nltk", "bitsandbytes")),
        ("tofu.runtime.ranks", ("torch", "accelerate")),
    ],
)
def test_what_a_module_does_not_load(module, heavy):
    code = f"import sys, {module}; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
