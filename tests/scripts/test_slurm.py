"""scripts/slurm/run.sh under a stand-in for slurm: two nodes, one after the other started on this machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import REPO

SLURM = """#!/usr/bin/env bash
case $(basename "$0") in
scontrol) printf 'localhost\\nelsewhere\\n' ;;
srun) shift; for _ in $(seq "$SLURM_NNODES"); do "$@" & done; for job in $(jobs -p); do wait "$job"; done ;;
torchrun) exec PYTHON -m torch.distributed.run "$@" ;;
esac
"""


@pytest.fixture
def slurm(tmp_path):
    """Run the script as sbatch would: slurm(SCRIPT, *ARGS) -> the finished process."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("scontrol", "srun", "torchrun"):
        (folder / name).write_text(SLURM.replace("PYTHON", sys.executable))
        (folder / name).chmod(0o755)

    def run(*args: object, submitted_from: Path = REPO):
        environment = {
            **os.environ,
            **{"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(submitted_from), "SLURM_NNODES": "2"},
            **{"SLURM_JOB_NODELIST": "x", "SLURM_JOB_ID": "7", "SLURM_GPUS_ON_NODE": "1", "OMP_NUM_THREADS": "1"},
            "PORT": str(29000 + os.getpid() % 900),
        }
        command = [str(REPO / "scripts" / "slurm" / "run.sh"), *map(str, args)]
        return subprocess.run(
            command,
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=200,
        )

    return run


@pytest.mark.slow
def test_two_nodes_share_one_run(slurm, model_folder, tmp_path):
    """A node a process: they meet, and one set of logs comes out that says so."""
    args = ("model_family=tiny", "data_path=data/mini", f"model_path={model_folder}", "ds_size=3", "split=forget10")
    done = slurm("evaluate_util.py", *args, f"save_dir={tmp_path}/out", "generation.max_length=100")
    assert done.returncode == 0, done.stderr[-3000:]
    assert '"world_size": 2' in (tmp_path / "out" / "versions.json").read_text()
    assert (tmp_path / "out" / "finished.json").is_file()


def test_a_script_that_is_not_there_is_told(slurm, tmp_path):
    done = slurm("forget.py", submitted_from=tmp_path)
    assert done.returncode == 2 and "submit from the repository, or set TOFU to it" in done.stderr
    assert slurm().returncode == 2
