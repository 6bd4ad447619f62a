"""The installed project is this checkout with all of its modules, and what is pinned once is read from there."""

import importlib.metadata
import json
import os
import subprocess
import sys
import tomllib

import pytest
import yaml
from helpers import REPO

PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())


def requirements() -> list[str]:
    """The lines of requirements.txt, without comments."""
    lines = (line.split("#")[0].strip() for line in (REPO / "requirements.txt").read_text().splitlines())
    return [line for line in lines if line]


def test_every_top_level_module_is_listed():
    assert PROJECT["tool"]["setuptools"]["py-modules"] == sorted(path.stem for path in REPO.glob("*.py"))


def test_this_checkout_is_installed(tmp_path):
    """From another folder, without the tests' own PYTHONPATH. It fails where another copy is the installed one."""
    code = (
        "import importlib.metadata, importlib.util, json;"
        "found = [importlib.util.find_spec(name).origin for name in ('utils', 'data_module')];"
        "print(json.dumps([found, importlib.metadata.requires('tofu')]))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"run `pip install -e .`\n{done.stderr[-2000:]}"
    found, needed = json.loads(done.stdout)
    assert found == [str(REPO / "utils.py"), str(REPO / "data_module.py")], "run `pip install -e .` here"
    assert [line for line in needed if "extra ==" not in line] == requirements()


def test_everything_is_pinned_and_tools_are_no_requirements():
    extras = PROJECT["project"]["optional-dependencies"]
    assert set(extras) == {"dev", "gpu", "report", "sweep", "vllm"}
    assert all(line.count("==") == 1 for line in [*requirements(), *sum(extras.values(), [])])
    assert not {line.split("==")[0] for line in requirements()} & {line.split("==")[0] for line in extras["dev"]}


def test_installed_tools_are_the_pinned_ones():
    for line in (*requirements(), *PROJECT["project"]["optional-dependencies"]["dev"]):
        name, version = line.split("==")
        installed = importlib.metadata.version(name.split("[")[0])
        assert installed.split("+")[0] == version, f"{name}: run `make setup`"


def test_one_version():
    assert yaml.safe_load((REPO / "CITATION.cff").read_text())["version"] == PROJECT["project"]["version"]


def test_hooks_download_nothing_and_are_there():
    for repo in yaml.safe_load((REPO / ".pre-commit-config.yaml").read_text())["repos"]:
        assert repo["repo"] == "local"
        for hook in repo["hooks"]:
            assert hook["language"] == "system" and os.access(REPO / hook["entry"].split()[0], os.X_OK), hook["id"]


@pytest.mark.parametrize(
    ("name", "size", "why"),
    [
        ("model.safetensors", 1, "weights are not committed"),
        ("a b/pytorch_model.bin", 1, "weights are not committed"),
        ("optimizer.pt", 0, "weights are not committed"),
        ("log.json", 1_000_001, "larger than 1,000,000 bytes"),
        ("log.json", 1_000_000, None),
    ],
)
def test_large_files_and_weights_are_refused(tmp_path, name, size, why):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"x" * size)
    (tmp_path / "small.py").write_text("")
    command = [REPO / "scripts" / "check_files.sh", "small.py", name, "deleted.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == (why is not None)
    assert done.stderr == "" if why is None else done.stderr.startswith(f"error: {name}: {why}")
