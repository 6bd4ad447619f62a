"""Imports run one way: a module imports only modules of rows above its own."""

import ast
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
ROWS = [
    {"ranks", "utils", "views", "architectures", "metric", "logs"},
    {"provenance", "tofu_metrics", "families", "forward"},
    {"run_folder", "models", "data_module", "losses", "log_formats", "page"},
    {"objective", "inference"},
    {"rmu", "pdu", "task_vector", "altpo", "references", "sets", "schema"},
    {"row_logs", "retain_log", "checks", "optimisation"},
    {"evaluator", "command_line", "dataloader"},
    {"job"},
    {"finetune", "forget", "evaluate_util", "aggregate_eval_stat"},
]

ROW = {name: number for number, row in enumerate(ROWS) for name in row}


def imported(path: Path) -> set[str]:
    """The modules of this repository that a file imports, also inside its functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names & set(ROW)


def test_every_module_has_a_row():
    assert {path.stem for path in REPO.glob("*.py")} == set(ROW)


def test_imports_run_one_way():
    for path in REPO.glob("*.py"):
        for name in imported(path):
            above = ROW[name] < ROW[path.stem]
            assert above, f"{path.name} imports {name}, which is not in a row above"


def test_row_zero_is_light():
    heavy = {"transformers", "datasets", "peft", "deepspeed", "accelerate", "hydra"}
    for name in ("losses", "tofu_metrics"):
        tree = ast.parse((REPO / f"{name}.py").read_text())
        found = {
            alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
        }
        found |= {
            node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module
        }
        assert not found & heavy, f"{name}.py imports {found & heavy}"
