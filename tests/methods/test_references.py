"""The reference model's log-probabilities: kept, read back, and those of a live forward."""

import json
import math

import pytest
import torch
from helpers import prepared

from tofu.methods import losses, references
from tofu.models import batches, engines, forward, loading
from tofu.runtime import run_folder


def test_kept_log_probabilities_are_live_ones(tmp_path):
    """What is written is read back for the same samples and model and made anew for others; it is a live forward's."""
    _, reference, terms, samples, logps = prepared("Llama", "dpo")
    for sample, value in logps.items():
        with torch.no_grad():
            view = forward.score(reference, batches.collate({"forget": [sample]}, row=100))["forget"]
        assert value == pytest.approx(losses.sequence_logp(view).item(), abs=1e-5, rel=1e-5)
    order, engine = list(logps), engines.Engine("ddp", False)
    made_from = references.logps_fingerprint(order, "model a", engine)
    references.write_logps(tmp_path, order, logps, made_from)
    assert references.read_logps(tmp_path, order, made_from) == logps
    for other in (
        references.logps_fingerprint(order, "model b", engine),
        references.logps_fingerprint(order[1:], "model a", engine),
        references.logps_fingerprint(order, "model a", engines.Engine("ddp", True)),
        references.logps_fingerprint(order, "model a", engine, quantize="4bit"),
    ):
        assert references.read_logps(tmp_path, order, other) is None
    assert json.loads((tmp_path / run_folder.REFERENCE).read_text())["logps"] == [logps[sample] for sample in order]


def test_a_run_that_replaces_another_uses_its_log_probabilities(model_folder, tmp_path, run_script, monkeypatch):
    """The second run loads no reference model and has the same losses; another precision makes them anew."""

    args = ("model_family=tiny", "data_path=data/mini", "engine=ddp", f"model_path={model_folder}", "split=forget05")
    args += ("forget_loss=dpo", "batch_size=10", "gradient_accumulation_steps=1", "num_epochs=2", "lr=1e-3")
    loaded, load = [], loading.load_frozen
    monkeypatch.setattr(loading, "load_frozen", lambda *a, **k: loaded.append(1) or load(*a, **k))

    def run(*more):
        run_script("forget.py", *args, f"save_dir={tmp_path}/run", "overwrite_dir=true", *more)
        history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
        return [line["loss"] for line in history if "loss" in line]

    first = run()
    assert run() == first and len(loaded) == 1
    run("precision=bf16")
    assert len(loaded) == 2
    run("LoRA.r=4", "LoRA.dropout=0")
    assert run("LoRA.r=4", "LoRA.dropout=0", "LoRA.quantize=4bit")[0] == pytest.approx(20 * math.log(2), abs=1e-5)
    assert len(loaded) == 4
    run("forget_loss=grad_ascent")
    assert not (tmp_path / "run" / run_folder.REFERENCE).exists()
