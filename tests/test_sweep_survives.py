"""A sweep that is interrupted and killed, and started again, ends as one that nothing happened to."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import MINI, REPO

from tofu.runtime import manifest

JOBS = 32
DIVERGES = "npo_forget05_1e+30_2"  # the one of them whose rate is another
FASTER = "${oc.select:forget_loss.by_split.${forget_loss.name}_${split}_${seed},2e-3}"
SWEEP = (
    *("-m", "model_family=tiny", f"data_path={MINI}", "engine=ddp", "progress=false", "batch_size=8", "num_epochs=1"),
    *("gradient_accumulation_steps=1", "save_dir='runs/${forget_loss.name}_${split}_${lr}_${seed}'"),
)
GRID = (
    *("split=forget05,forget10", "forget_loss=grad_ascent,grad_diff,npo,idk", f"lr=1e-3,'{FASTER}'", "seed=1,2"),
    "++forget_loss.by_split={npo_forget05_2: 1e30}",
)
TIMES = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "seconds")
pytestmark = pytest.mark.slow


def begin(folder: Path, *args: str) -> subprocess.Popen:
    """Start a sweep in a folder of its own; what it says goes to a file there."""
    folder.mkdir(exist_ok=True)
    words = [sys.executable, str(REPO / "forget.py"), *args]
    with (folder / "said").open("w") as said:
        return subprocess.Popen(words, cwd=folder, stdout=said, stderr=subprocess.STDOUT)


def finished(folder: Path) -> set[str]:
    return {path.parent.name for path in folder.glob("runs/*/finished.json")}


def content(file: Path):
    """A file's bytes; of a run's records what does not tell how fast the machine was, nor where the run lies."""
    if file.name not in ("trainer_state.json", "finished.json", "versions.json"):
        return file.read_bytes()
    found = json.loads(file.read_text())
    for name in ("directory", "stages"):
        found.pop(name, None)
    for name in ("trainer_state.json", "versions.json"):  # their digests
        found.get(manifest.KEY, {}).pop(name, None)
    for line in (found, *found.get("log_history", ())):
        for name in (*TIMES, "total_flos"):
            line.pop(name, None)
    return found


def runs(folder: Path) -> dict[str, dict]:
    """Every run's files but the list of what it wrote, where a second start may add nothing."""
    return {
        run.name: {file.name: content(file) for file in run.iterdir() if file.name != "written.txt"}
        for run in (folder / "runs").iterdir()
    }


def outcomes(folder: Path) -> tuple[str, list[str]]:
    """The line above the table at the end, and the table's rows."""
    lines = (folder / "said").read_text().splitlines()
    first = max(i for i, line in enumerate(lines) if f" {JOBS} jobs: " in line)
    return lines[first].split(" ", 1)[1], lines[first + 2 : first + 2 + JOBS]


@pytest.fixture(scope="module")
def whole(model_folder, tmp_path_factory):
    """The sweep that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    assert begin(folder, *SWEEP, *GRID, f"model_path={model_folder}").wait(900) == 2
    return folder


def test_interrupted_and_killed(whole, model_folder, tmp_path):
    """By Ctrl-C, by kill -9, then to its end: the same bytes, and a table with the one that diverges."""
    said, rows = outcomes(whole)
    assert said == "32 jobs: 31 done, 1 failed" and len(finished(whole)) == 31
    assert [row for row in rows if "failed: step " in row and "the model has diverged" in row] == [rows[11]]
    draw = random.Random(0)
    for how, least in ((signal.SIGINT, 4), (signal.SIGKILL, 14)):
        process, until = begin(tmp_path / "cut", *SWEEP, *GRID, f"model_path={model_folder}"), time.monotonic() + 300
        while len(finished(tmp_path / "cut")) < least and process.poll() is None and time.monotonic() < until:
            time.sleep(0.02)
        time.sleep(draw.uniform(0, 1.5))
        process.send_signal(how)
        assert process.wait(120) in ((75, 130) if how == signal.SIGINT else (-9,))
        before = finished(tmp_path / "cut")
        assert least <= len(before) < 31
        if how == signal.SIGINT:
            said, rows = outcomes(tmp_path / "cut")
            assert f"{len(before)} done" in said and f"{JOBS - len(before)} not run" in said and "error" not in said
    assert begin(tmp_path / "cut", *SWEEP, *GRID, f"model_path={model_folder}").wait(900) == 2
    said, rows = outcomes(tmp_path / "cut")
    assert said == f"32 jobs: {31 - len(before)} done, {len(before)} complete, 1 failed", said
    ended, expected = runs(tmp_path / "cut"), runs(whole)
    assert ended.keys() == expected.keys() and DIVERGES in ended
    for name, files in expected.items():
        assert ended[name].keys() == files.keys(), name
        assert [one for one in files if ended[name][one] != files[one]] == [], name


def test_two_jobs_at_once(whole, model_folder, tmp_path):
    """Each in a process of its own, on a CPU: the files of the jobs that ran one after another."""
    args = ("split=forget05", "forget_loss=grad_diff", "lr=1e-3", "seed=1,2", f"model_path={model_folder}")
    launcher = ("hydra/launcher=processes", "hydra.launcher.parallel=2")
    assert begin(tmp_path / "two", *SWEEP, *GRID[-1:], *args, *launcher).wait(300) == 0
    said = (tmp_path / "two" / "said").read_text()
    first, second = (said.index(f"[{i}] ") for i in (0, 1))
    assert max(first, second) < min(said.index(f"[{i}] {'{'}'train_runtime") for i in (0, 1)), "they ran side by side"
    expected = runs(whole)
    for name, files in runs(tmp_path / "two").items():
        assert files.keys() == expected[name].keys()
        differ = [one for one in files if files[one] != expected[name][one]]
        assert differ == ["versions.json"], "which has the command line"


def test_two_processes_go_on_after_a_job_that_diverges(model_folder, launch, tmp_path):
    """Under torchrun: all ranks have found it, and go on together."""
    args = ("split=forget05", "forget_loss=grad_diff", "lr=1e-3,1e30,2e-3", "seed=1", "batch_size=4")
    args += (f"model_path={model_folder}",)
    done = launch("forget.py", *SWEEP, *args, processes=2, cwd=tmp_path, check=False)
    assert done.returncode and finished(tmp_path) == {"grad_diff_forget05_0.001_1", "grad_diff_forget05_0.002_1"}
    assert "3 jobs: 2 done, 1 failed" in done.stdout and done.stderr.count("error: job 1 (") == 1
    assert done.stderr.count("error: 1 of 3 jobs failed") == 1
