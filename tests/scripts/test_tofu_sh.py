"""scripts/tofu.sh with scripts that only leave a record: what it runs, skips, makes again and refuses."""

import os
import subprocess
import sys

import pytest
from helpers import REPO

FAKE = """
import json, os, runpy, sys
script = os.path.basename(sys.argv[1])
if script == "complete.py":
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
elif script != "aggregate_eval_stat.py":
    from tofu.runtime import provenance
    args = dict(arg.partition("=")[::2] for arg in sys.argv[2:])
    out, read = args["save_dir"], {key: args.get(key) for key in provenance.INPUTS}
    os.makedirs(out, exist_ok=True)
    record = {"command": sys.argv[1:], "inputs": provenance.inputs(read)}
    open(f"{out}/versions.json", "w").write(json.dumps(record))
    open(f"{out}/eval_log_aggregated.json", "w").write(json.dumps(os.urandom(4).hex()))
    open(f"{out}/finished.json", "w").write(json.dumps(os.urandom(4).hex()))
"""


@pytest.fixture
def tofu(tmp_path):
    """Run the protocol for one loss: (exit code, save_dirs run, save_dirs skipped, what stderr says)."""
    (tmp_path / "fake.py").write_text(FAKE)

    def run(split="forget10", cwd=tmp_path, **environment):
        fake = {"PYTHON": f"{sys.executable} {tmp_path}/fake.py", "RUNS": "runs", "DATA": "data/mini"}
        done = subprocess.run(
            [REPO / "scripts" / "tofu.sh", "tiny", split, "KL"],
            cwd=cwd,
            env={**os.environ, **fake, **environment},
            capture_output=True,
            text=True,
        )
        lines = done.stdout.splitlines()
        ran = [line.split("save_dir=")[1].removeprefix("runs/") for line in lines if line.startswith("== ")]
        skipped = [line.removeprefix("complete: runs/") for line in lines if line.startswith("complete: ")]
        return done.returncode, ran, skipped, done.stderr

    return run


ALL = ["full", "retain90", "retain90/eval_forget10", "full/eval_forget10", "forget10_KL", "forget10_KL/eval_forget10"]
SETTINGS = {"FINETUNE": "lr=7e-4", "FORGET": "lr=2e-4 eval_while_train=true", "EVALUATE": "ds_size=5 engine=ddp"}


def test_what_is_complete_is_skipped(tofu, tmp_path):
    """Also where a number or a path is written in another way, or the launcher is another."""
    assert tofu(**SETTINGS) == (0, ALL, [], "")
    assert tofu(**SETTINGS) == (0, [], ALL, "")
    again = {**SETTINGS, "FINETUNE": "lr=0.0007", "RUNS": f"{tmp_path}/runs", "DATA": f"{REPO}/data/mini"}
    code, ran, skipped, _ = tofu(**again, LAUNCH=f"env A=b {sys.executable} {tmp_path}/fake.py")
    assert (code, ran, len(skipped)) == (0, [], 6)
    (tmp_path / "elsewhere").mkdir()
    code, ran, skipped, said = tofu(**again, cwd=tmp_path / "elsewhere")
    assert (code, ran, len(skipped)) == (0, [], 6), said


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"FINETUNE": "lr=1e-3"}, "runs/full was made with other settings: lr=7e-4 (now 1e-3); remove it or set RUNS="),
        ({"FINETUNE": ""}, "runs/full was made with other settings: lr=7e-4 (now not given)"),
        ({"EVALUATE": "ds_size=6"}, "runs/retain90/eval_forget10 was made with other settings: ds_size=5 (now 6), eng"),
        ({"FORGET": "lr=2e-4 seed=1"}, "runs/forget10_KL was made with other settings: eval.ds_size=5 (now not given)"),
        ({"DATA": "locuslab/TOFU"}, "data_path=data/mini (now locuslab/TOFU)"),
    ],
)
def test_what_was_made_with_other_settings_stops_it(tofu, other, said):
    tofu(**SETTINGS)
    code, ran, _, stderr = tofu(**{**SETTINGS, **other})
    assert (code, ran) == (2, []) and stderr.startswith("error: ") and said in stderr and stderr.count("\n") == 1


def test_what_was_made_of_something_older(tofu, tmp_path):
    """An evaluation is made again after its model; an unlearning costs too much to be replaced unasked."""
    tofu(**SETTINGS)
    (tmp_path / "runs" / "retain90" / "finished.json").unlink()
    code, ran, _, stderr = tofu(**SETTINGS)
    assert (code, ran) == (2, ["retain90", "retain90/eval_forget10", "full/eval_forget10"])
    assert "error: runs/forget10_KL was made from another eval.retain_result=runs/retain90/eval_forget10/" in stderr
    (tmp_path / "runs" / "forget10_KL" / "finished.json").unlink()
    assert tofu(**SETTINGS)[:2] == (0, ["forget10_KL", "forget10_KL/eval_forget10"])


@pytest.mark.parametrize("split", ["forget1", "retain90", "forget10_perturbed", "forget00"])
def test_the_split_is_checked_first(tofu, split, tmp_path):
    code, ran, _, stderr = tofu(split)
    assert (code, ran) == (2, []) and stderr.startswith(f"error: SPLIT={split}: it must be forget01")
    assert not (tmp_path / "runs").exists()


def test_an_unlearnings_own_evaluations_get_what_they_take(tofu, tmp_path):
    tofu(**SETTINGS)
    command = (tmp_path / "runs" / "forget10_KL" / "versions.json").read_text()
    assert "eval.ds_size=5" in command and "eval.engine" not in command
    assert "eval.retain_result=runs/retain90/eval_forget10/eval_log_aggregated.json" in command
