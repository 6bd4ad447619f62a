"""The benchmarks run: at toy size, and what they compare is equal (they check it themselves)."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import REPO, needs_shared


@needs_shared
def test_train_speed_at_toy_size(tmp_path):
    """Every job; that the three ways have the same first loss to 1e-4 is asserted inside."""
    out = tmp_path / "figures.json"
    command = [sys.executable, str(REPO / "benchmarks" / "train_speed.py"), "--size", "toy", "--repetitions", "1"]
    done = subprocess.run(
        [*command, "--steps-only", "--no-results", "--json", str(out)], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads(out.read_text())["figures"]
    jobs = ("finetune", "grad_ascent", "grad_diff", "KL", "idk")
    names = {f"{job}_vs_{other}" for job in jobs for other in ("500", "longest")}
    assert set(figures) == names | {"dpo_vs_longest", "finetune32k_vs_longest", "matmul_share"}
    assert all(value > 0 for value in figures.values()) and figures["finetune_vs_500"] > 1
    assert {path.name for path in tmp_path.iterdir()} == {"figures.json"}


@needs_shared
@pytest.mark.slow
def test_protocol_at_toy_size(tmp_path):
    """Every stage has its seconds; a setting that is refused has no number but the script's own reason."""

    def run(*args):
        command = [sys.executable, str(REPO / "benchmarks" / "protocol.py"), *args, "--no-results", "--json", "out"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout, json.loads((tmp_path / "out").read_text())["figures"]

    _, figures = run("--size", "toy", "--rows", "24")
    stages = {f"{stage}_grad_diff" for stage in ("forget", "evaluate", "aggregate")}
    stages |= {"finetune", "oracle", "evaluate_oracle", "whole"}
    assert set(figures) == {f"{stage}_s" for stage in stages} and all(value > 0 for value in figures.values())
    text, figures = run("--memory", "--sizes", "toy", "--settings", "full_stochastic", "lora_dpo")
    assert 0.1 < figures["toy_lora_dpo_gb"] < 10
    if not torch.cuda.is_available():
        assert set(figures) == {"toy_lora_dpo_gb"}
        assert "| toy_full_stochastic | not run: optim=adamw_8bit_stochastic trains bf16 weights on one process" in text
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
