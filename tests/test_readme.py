"""What README.md promises, executed as it is printed: a method, a model, a set of one's own, links."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import yaml
from helpers import METHODS, MINI, REPO
from hub_cache import add

README = (REPO / "README.md").read_text()


def blocks(title: str, page: str = README) -> list[tuple[str, str]]:
    """(language, text) of the code blocks of one section."""
    section = page.split(f"\n## {title}\n")[1].split("\n## ")[0]
    return re.findall(r"```(\w+)\n(.*?)```", section, re.S)


@pytest.fixture
def checkout(tmp_path):
    """A copy of what git would give a new user, to be changed."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in REPO.glob("*.py"):
        shutil.copy(path, copy)
    for folder in ("config", "data", "docs", "tests", "tofu", "benchmarks"):
        ignored = shutil.ignore_patterns("__pycache__", "tiny")
        shutil.copytree(REPO / folder, copy / folder, ignore=ignored)
    for name in ("README.md", "pyproject.toml"):
        shutil.copy(REPO / name, copy)
    return copy


def python(checkout, *args: str, **environment: str) -> subprocess.CompletedProcess:
    """Run a command of the README in a copy, as its own project."""
    return subprocess.run(
        [sys.executable, *args],
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": str(checkout), **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture
def with_a_method(checkout):
    """The copy with what "Add a method" says, followed to the letter; the name of the method and its command line."""
    (_, function), (_, listed), (_, config), (_, number), (_, row), (_, command) = blocks("Add a method")
    losses = checkout / "tofu" / "methods" / "losses.py"
    text, table = losses.read_text(), "\n# A loss that reads the forget set"
    assert text.count(table) == 1 and text.count("        grad_ascent,\n") == 1
    text = text.replace(table, f"\n{function}\n{table}")
    losses_text = text.replace("        grad_ascent,\n", f"        grad_ascent,\n{listed}")
    losses.write_text(losses_text)
    name = yaml.safe_load(config)["name"]
    (checkout / "config" / "forget_loss" / f"{name}.yaml").write_text(config)
    tests = checkout / "tests" / "methods" / "test_losses.py"
    tests.write_text(tests.read_text().replace("NAMED = {\n", f"NAMED = {{\n{number}", 1))
    page = checkout / "docs" / "methods.md"
    first = next(line for line in page.read_text().splitlines() if line.startswith("| [`grad_ascent`]"))
    page.write_text(page.read_text().replace(first, f"{row}{first}", 1))
    return name, shlex.split(command.split("python ", 1)[1])


def test_add_a_method(with_a_method, checkout, model_folder):
    _, args = with_a_method
    done = python(checkout, *args, f"model_path={model_folder}", "save_dir=run")
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((checkout / "run" / "finished.json").read_text())["train_loss"]


@pytest.mark.slow
def test_add_a_method_leaves_the_tests_green(with_a_method, checkout):
    """Those of the losses and the configs, the method's own among them."""
    name, _ = with_a_method
    chosen = f"{name} or capped_ascent or methods_page or has_its_number or learning_rates"
    tests = ("tests/methods/test_losses.py", "tests/test_configs.py")
    done = python(checkout, "-m", "pytest", "-n", "0", "-q", *tests, "-k", chosen)
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout[-3000:]


@pytest.fixture
def with_a_metric(checkout):
    """The copy with what docs/metrics.md says under "Add a metric", followed to the letter; its command line."""
    page = (REPO / "docs" / "metrics.md").read_text()
    (_, function), (_, entry), (_, test), (_, command) = blocks("Add a metric", page)
    module = checkout / "tofu" / "evaluation" / "metrics" / "memorisation.py"
    text = module.read_text()
    assert text.count("\ndef _of(") == 1 and text.count("\nMETRICS = (\n") == 1
    text = text.replace("\ndef _of(", f"\n{function}\n\ndef _of(")
    module.write_text(text.replace("\nMETRICS = (\n", f"\nMETRICS = (\n{entry}"))
    tests = checkout / "tests" / "evaluation" / "metrics" / "test_memorisation.py"
    tests.write_text(f"{tests.read_text()}\n\n{test}")
    return shlex.split(command.split("python ", 1)[1])


def test_add_a_metric(with_a_metric, checkout, model_folder):
    done = python(checkout, *with_a_metric, f"model_path={model_folder}", "save_dir=run", "ds_size=3")
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((checkout / "run" / "metrics.json").read_text())["Longest Run Forget"]
    assert 0 <= found["value"] <= 1 and found["n"] == 3 and found["group"] == "memorisation"


@pytest.mark.slow
def test_add_a_metric_leaves_the_tests_green(with_a_metric, checkout):
    """Those of the metrics of a row, the metric's own among them."""
    tests = "tests/evaluation/metrics/test_memorisation.py"
    done = python(checkout, "-m", "pytest", "-n", "0", "-q", tests, "-m", "not slow")
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout[-3000:]


def test_adding_a_model(checkout, model_folder, tmp_path):
    """The entry as it is printed; the hub id in it is in the local cache."""
    (_, entry), (_, command) = blocks("Adding a model")
    ((name, keys),) = yaml.safe_load(entry).items()
    file = checkout / "config" / "model_config.yaml"
    file.write_text(f"{file.read_text()}\n{entry}")
    add(tmp_path / "home", "model", keys["hf_key"], model_folder)
    args = shlex.split(command.split("python ", 1)[1])
    assert f"model_family={name}" in args
    small = ("split=forget10", "num_epochs=3", "save_dir=run", "engine=ddp")
    done = python(checkout, *args, *small, HF_HOME=str(tmp_path / "home"), HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert (checkout / "run" / "model.safetensors").is_file()


def test_your_own_set(run_script, model_folder, tmp_path, monkeypatch):
    """One more entry in each list: it is logged, shown, and counts in no score."""
    ((_, command),) = blocks("Your own data")
    monkeypatch.chdir(tmp_path)
    script, *args = shlex.split(command)[1:]
    args = [arg.replace("PATH", str(model_folder)) for arg in args]
    run_script(script, *args, "ds_size=2", "generation.max_new_tokens=4", "save_dir=run")
    log = json.loads((tmp_path / "run" / "eval_log_aggregated.json").read_text())
    assert len(log) == 5 and len(log["eval_log_mine.json"]["avg_gt_loss"]) == 2
    scores = json.loads((tmp_path / "run" / "finished.json").read_text())
    assert "Model Utility" in scores and not any("mine" in name for name in scores)
    assert "eval_log_mine" in (tmp_path / "run" / "eval_report.md").read_text()
    assert MINI.is_dir()


def test_its_size_links_and_names():
    assert len(README.splitlines()) <= 200
    for path in [REPO / "README.md", *(REPO / "docs").glob("*.md")]:
        for link in re.findall(r"\]\((?!http)([^)#]+)", path.read_text()):
            assert (path.parent / link).exists(), f"{path.name} links to {link}"
    for method in METHODS:
        assert f"`{method}`" in README, method


def test_its_command_lines_have_only_keys_that_exist(run_script, capsys):
    """Every line of ours in it composes: --cfg job prints the config and stops."""
    lines = re.findall(r"^(?:torchrun --\S+ --\S+|python) ((?:\w+)\.py .*)$", README, re.M)
    assert len(lines) >= 7
    for line in lines:
        script, *args = shlex.split(line)
        if "capped" not in line and "my-model" not in line:
            run_script(script, *args, "--cfg", "job")
            assert "model_family" in (told := capsys.readouterr().out) or "retain_result" in told, line
