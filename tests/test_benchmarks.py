"""The benchmarks run: at toy size, and what they compare is equal (they check it themselves)."""

import json
import subprocess
import sys

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
    names = {f"{job}_vs_{other}" for job in ("finetune", "grad_diff", "KL") for other in ("500", "longest")}
    assert set(figures) == names | {"dpo_vs_longest", "finetune32k_vs_longest", "matmul_share"}
    assert all(value > 0 for value in figures.values()) and figures["finetune_vs_500"] > 1
    assert {path.name for path in tmp_path.iterdir()} == {"figures.json"}
