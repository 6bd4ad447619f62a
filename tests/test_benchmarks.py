"""The benchmarks run: at toy size, and what they compare is equal (they check it themselves)."""

import json
import subprocess
import sys

import pytest
import torch
from helpers import REPO, needs_shared

import data_module


@needs_shared
@pytest.mark.slow
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


def test_which_order_of_the_methods_is_seen(monkeypatch):
    """Of a utility of 0.5, 0.04 is a collapse and 0.06 is none; only what is above both has kept more."""
    monkeypatch.syspath_prepend(REPO / "benchmarks")
    import methods

    def runs(name, *utility, why=None):
        scores = {"Model Utility": list(utility), "ROUGE Forget": [0.2] * len(utility)}
        return methods.Runs(name, "", scores, [(0.0, 0.0)] * len(utility), None, why)

    start = runs("finetuned", 0.5)
    found = [runs("grad_ascent", 0.03, 0.05), runs("npo", 0.3), runs("simnpo", 0.045)]
    assert [line.partition(": ")[2] for line in methods.order(found, start) if line.startswith("- ")] == [
        "seen, utility 0.040 of 0.500 with forget ROUGE-L 0.200",
        "seen, utility 0.300 of 0.500 with forget ROUGE-L 0.200",
        "not seen, utility 0.045 of 0.500 with forget ROUGE-L 0.200",
    ]
    assert "10% of the utility at most: not seen, utility 0.060" in methods.order([runs("grad_ascent", 0.06)], start)[2]
    assert methods.order([runs("grad_ascent", why="diverged")], start)[2].endswith("seen, no run, diverged")
    assert methods.order([runs("npo", 0.3)], start) == []


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (("--seeds", "0"), "--seeds must be at least 1"),
        (("--splits", "forget05"), "--splits forget05: with --on mini there are forget10"),
        (("--on", "tofu", "--methods", "altpo"), "altpo has no learning rate in tofu_lrs.yaml"),
    ],
)
def test_methods_refuses_before_it_makes_anything(tmp_path, monkeypatch, capsys, args, told):
    monkeypatch.syspath_prepend(REPO / "benchmarks")
    import methods

    monkeypatch.setattr(sys, "argv", ["methods.py", "--work", str(tmp_path / "work"), *args])
    with pytest.raises(SystemExit) as refused:
        methods.main()
    assert refused.value.code == 2 and told in capsys.readouterr().err and not list(tmp_path.iterdir())


@needs_shared
def test_what_the_small_model_learns_of_the_real_data(tmp_path, monkeypatch):
    """The split's rows, then the 217 true facts twice."""
    monkeypatch.syspath_prepend(REPO / "benchmarks")
    import methods

    data, columns = str(REPO.parent / "shared" / "tofu"), ("question", "answer")
    methods.write_learned(data, ["retain90"], tmp_path)
    retain, *facts = (data_module.load_rows(data, one, columns) for one in ("retain90", "real_authors", "world_facts"))
    facts = [row for rows in facts for row in rows]
    assert len(retain) == 3600 and len(facts) == 217
    assert data_module.load_rows(str(tmp_path), "retain90", columns) == retain + 2 * facts


@pytest.mark.slow
def test_methods_on_the_embedded_default(tmp_path):
    """Two methods from one model, one of them to be seen doing better than the other. Builds data/tiny if missing."""
    command = [sys.executable, str(REPO / "benchmarks" / "methods.py"), "--methods", "grad_ascent", "grad_diff"]
    command += ["--seeds", "1", "--work", "work", "--no-results", "--json", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    figures = json.loads((tmp_path / "out").read_text())["figures"]
    assert figures["grad_diff_model_utility"] > figures["grad_ascent_model_utility"]
    assert figures["grad_diff_forget_ROUGE_L"] < figures["oracle_forget_ROUGE_L"] < figures["finetuned_forget_ROUGE_L"]
    assert "- grad_ascent: forget term" in done.stdout
