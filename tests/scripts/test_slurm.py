"""scripts/slurm/run.sh under a stand-in for slurm: two nodes, one after the other started on this machine.

As in slurm, srun passes SIGUSR1 on to its tasks, and kills them where it gets a SIGTERM.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import REPO

SLURM = """#!/usr/bin/env bash
case $(basename "$0") in
scontrol)
    if [ "$1" = requeue ]; then echo "$2" >> "$REQUEUED"; else printf 'localhost\\nelsewhere\\n'; fi ;;
srun)
    shift
    tasks=
    for _ in $(seq "$SLURM_NNODES"); do "$@" & tasks="$tasks $!"; done
    trap 'kill -USR1 $tasks' USR1
    trap 'kill -KILL $tasks' TERM
    code=0
    for task in $tasks; do
        while kill -0 "$task" 2>/dev/null; do wait "$task" || code=$?; done
    done
    exit "$code" ;;
torchrun) exec PYTHON -m torch.distributed.run "$@" ;;
esac
"""


@pytest.fixture
def slurm(tmp_path):
    """Start the script as sbatch would: slurm(SCRIPT, *ARGS)."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("scontrol", "srun", "torchrun"):
        (folder / name).write_text(SLURM.replace("PYTHON", sys.executable))
        (folder / name).chmod(0o755)

    def start(*args: object, submitted_from: Path = REPO, **environment: str) -> subprocess.Popen:
        environment = {
            **os.environ,
            **{"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(submitted_from), "SLURM_NNODES": "2"},
            **{"SLURM_JOB_NODELIST": "x", "SLURM_JOB_ID": str(os.getpid()), "SLURM_GPUS_ON_NODE": "1"},
            **{"OMP_NUM_THREADS": "1", "PORT": str(29000 + os.getpid() % 900), "REQUEUED": str(tmp_path / "requeued")},
            **environment,
        }
        command = [str(REPO / "scripts" / "slurm" / "run.sh"), *map(str, args)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL, "text": True}
        return subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes)

    return start


def ended(process: subprocess.Popen) -> subprocess.CompletedProcess:
    """What a job that was started has said, and its exit code."""
    out, err = process.communicate(timeout=200)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.mark.slow
def test_two_nodes_share_one_run(slurm, model_folder, tmp_path):
    """A node a process: they meet, and one set of logs comes out that says so."""
    args = ("model_family=tiny", "data_path=data/mini", f"model_path={model_folder}", "ds_size=3", "split=forget10")
    done = ended(slurm("evaluate_util.py", *args, f"save_dir={tmp_path}/out", "generation.max_length=100"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert '"world_size": 2' in (tmp_path / "out" / "versions.json").read_text()
    assert (tmp_path / "out" / "finished.json").is_file()


@pytest.mark.slow
def test_a_warned_run_goes_back_into_the_queue_and_on(slurm, model_folder, tmp_path):
    """Warned in the middle of a training: it saves, is put back into the queue, and the next start ends it."""
    args = ("model_family=tiny", "data_path=data/mini", f"model_path={model_folder}", "split=forget10", "lr=1e-3")
    args = ("forget.py", *args, "batch_size=4", "num_epochs=2", f"save_dir={tmp_path}/out", "overwrite_dir=true")
    pulse = tmp_path / "pulse.0"
    told = {"FAULT_PULSE": str(tmp_path / "pulse"), "FAULT_PAUSE": "0.5", "PYTHONPATH": str(REPO)}
    job = slurm("tests/fault_worker.py", *args, **told)
    while job.poll() is None and not (pulse.is_file() and int(pulse.read_text() or 0) > 2):
        time.sleep(0.1)
    job.send_signal(signal.SIGUSR1)
    done = ended(job)
    assert "interrupted by SIGUSR1: saved at step" in done.stderr, done.stderr[-3000:]
    assert done.returncode == 0 and (tmp_path / "requeued").read_text().split() == [str(os.getpid())]
    assert (tmp_path / "out" / "interrupted.json").is_file()

    done = ended(slurm("tests/fault_worker.py", *args, **told | {"FAULT_PAUSE": "0"}, SLURM_RESTART_COUNT="1"))
    assert done.returncode == 0 and "going on after step" in done.stdout, done.stderr[-3000:]
    assert (tmp_path / "out" / "finished.json").is_file() and not (tmp_path / "out" / "interrupted.json").exists()
    assert len((tmp_path / "requeued").read_text().split()) == 1


@pytest.mark.slow
def test_a_job_is_put_back_so_many_times_and_no_more(slurm, tmp_path):
    """With a script in the suite's place that says at once that it was interrupted."""
    (tmp_path / "stopped.py").write_text("import os; open(os.environ['TOFU_INTERRUPTED'], 'w').write('{}'); exit(75)")
    one = {"submitted_from": tmp_path, "SLURM_NNODES": "1"}
    done = ended(slurm("stopped.py", **one, SLURM_RESTART_COUNT="2", MAX_REQUEUE="3"))
    assert done.returncode == 0 and (tmp_path / "requeued").is_file(), done.stderr
    done = ended(slurm("stopped.py", **one, SLURM_RESTART_COUNT="3", MAX_REQUEUE="3"))
    assert done.returncode == 75 and "MAX_REQUEUE=3 is reached" in done.stderr
    assert len((tmp_path / "requeued").read_text().split()) == 1 and not list(tmp_path.glob(".interrupted*"))


def test_a_script_that_is_not_there_is_told(slurm, tmp_path):
    done = ended(slurm("forget.py", submitted_from=tmp_path))
    assert done.returncode == 2 and "submit from the repository, or set TOFU to it" in done.stderr
    assert ended(slurm()).returncode == 2
