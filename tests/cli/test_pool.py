"""Jobs side by side: a signal to the sweep reaches them, they save, and the sweep says so."""

import os
import signal
import subprocess
import sys
import threading
import time
import types

import pytest
from helpers import MINI, REPO

from tofu.cli import pool, sweeps

JOB = """
import os, pathlib, signal, sys, time
from tofu.runtime import parent, signals
parent.end_with_parent()
with signals.handled():
    pathlib.Path(sys.argv[1] + '.begun').touch()
    while not signals.requested():
        time.sleep(0.02)
    time.sleep(0.2)
    print('saving', 'x' * 100_000, flush=True)  # more than a pipe holds
    pathlib.Path(sys.argv[1]).write_text(signals.requested())
sys.exit(75)
"""
SWEEP = """
import sys, types
sys.path.insert(0, {repo!r})
from tofu.cli import pool
task = types.SimpleNamespace(plan=[], seconds=[], scratch={scratch!r}, stderr=sys.stderr)
task.command = lambda job: [sys.executable, '-c', {job!r}, job[0]]
pool.launch(types.SimpleNamespace(task=task, parallel=2), [[one] for one in {jobs!r}], 0)
"""


def until(true, seconds=60):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def begin(folder, jobs=("one", "two", "three")):
    """Three jobs, two at a time, in a process; what it says goes into a pipe."""
    code = SWEEP.format(repo=str(REPO), scratch=str(folder), job=JOB, jobs=[str(folder / one) for one in jobs])
    env = {**os.environ, "PYTHONPATH": str(REPO), "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    until(lambda: len(list(folder.glob("*.begun"))) == 2)
    return process


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_is_passed_on(tmp_path, name):
    process = begin(tmp_path)
    process.send_signal(getattr(signal, name))
    said = process.communicate(timeout=60)[0].decode()
    assert process.returncode == 75 and f"interrupted by {name}: what the sweep's jobs have saved stands; run" in said
    assert [(tmp_path / one).read_text() for one in ("one", "two")] == [name] * 2
    assert not (tmp_path / "three").exists() and "[0] saving xxx" in said and "[1] saving xxx" in said


def test_killed(tmp_path):
    """The jobs end as by SIGTERM, and no closed pipe ends them before they have saved."""
    process = begin(tmp_path)
    process.kill()
    process.communicate(timeout=60)
    until(lambda: all((tmp_path / one).is_file() for one in ("one", "two")))
    assert {(tmp_path / one).read_text() for one in ("one", "two")} == {"SIGTERM"}


def test_a_job_that_is_interrupted_ends_the_sweep(tmp_path, capfd):
    task = types.SimpleNamespace(plan=[], seconds=[], scratch=str(tmp_path), stderr=sys.stderr)
    codes = ["import sys; sys.exit(75)", "import time; time.sleep(60)"]
    task.command = lambda job: [sys.executable, "-c", codes[int(job[0])]]
    before = threading.active_count()
    with pytest.raises(SystemExit, match="75"):
        pool.launch(types.SimpleNamespace(task=task, parallel=2), [["0"], ["1"]], 0)
    assert "interrupted by SIGTERM" in capfd.readouterr().err and threading.active_count() <= before


SMALL = ("-m", "model_family=tiny", f"data_path={MINI}", "split=forget05", "forget_loss=grad_ascent", "num_epochs=300")
SMALL += ("batch_size=10", "gradient_accumulation_steps=1", "progress=false", "lr=1e-6,2e-6", "save_dir='r${lr}'")
SIDE = ("hydra/launcher=processes", "hydra.launcher.parallel=2")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGKILL"])
def test_a_sweep_saves(model_folder, tmp_path, name):
    words = [sys.executable, str(REPO / "forget.py"), *SMALL, *SIDE, f"model_path={model_folder}"]
    with (tmp_path / "said").open("w") as out:
        process = subprocess.Popen(words, cwd=tmp_path, stdout=out, stderr=out)
    runs = [tmp_path / "r1e-06", tmp_path / "r2e-06"]
    until(lambda: all((run / "trainer_state.json").is_file() for run in runs), 200)
    process.send_signal(getattr(signal, name))
    code = process.wait(60)
    until(lambda: all((run / "interrupted.json").is_file() for run in runs))
    assert all(list(run.glob("resume/step-*/manifest.json")) for run in runs)
    if name == "SIGTERM":
        said = (tmp_path / "said").read_text()
        assert code == 75 and "2 jobs: 2 not run" in said and said.count("interrupted by SIGTERM: saved at step") >= 2


def test_hydras_folder_is_read_where_it_is_written(tmp_path):
    """Outcomes lie in a folder of their own in there; those of another sweep do not count, and nothing is left."""
    named = tmp_path / "a" / "b"
    for said in (f"hydra.sweep.dir={named}", f"hydra.sweep.dir='{named}/${{now:%H}}'"):
        with sweeps.folder(["x.py", "-m", said]) as first, sweeps.folder(["x.py", "-m", said]) as second:
            sweeps.write(sweeps.Outcome(0, ["lr=1"], sweeps.DONE), first)
            assert sweeps.outcomes(second) == [] and [one.state for one in sweeps.outcomes(first)] == ["done"]
            assert first.startswith(str(named))
    assert not named.exists()


@pytest.mark.slow
def test_a_sweep_with_hydras_folder_tells_what_became_of_its_jobs(
    run_script, model_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    args = (*SMALL, f"model_path={model_folder}", "hydra.sweep.dir=here", "dry_run=true")
    run_script("forget.py", *args)
    assert "2 jobs: 2 done" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        run_script("forget.py", *args, "LoRA.quantize=4bit")
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="2"):
        run_script("forget.py", *args[:-2], "hydra.sweep.dir=file")
    assert "file cannot be written (" in capsys.readouterr().err
