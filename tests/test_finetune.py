"""finetune.py: what it trains, what it leaves, which model it starts from."""

import json

import pytest
import torch
from helpers import MINI
from transformers import AutoModelForCausalLM

from tofu.models import families


@pytest.fixture
def finetuned(run_script, model_folder, tmp_path, monkeypatch):
    """A run of finetune.py on 20 rows from the random model: its folder, and what main returned."""
    known = families.entries().copy()
    known.tiny.hf_key = str(model_folder)
    monkeypatch.setattr(families, "entries", lambda: known)

    def go(*args):
        common = ("model_family=tiny", f"data_path={MINI}", "split=forget05", "engine=ddp", "batch_size=10", "lr=1e-3")
        scores = run_script("finetune.py", *common, "num_epochs=2", f"save_dir={tmp_path}/run", *args)
        return tmp_path / "run", scores

    return go


def test_it_learns_its_rows(finetuned, model_folder):
    """The loss falls from that of the pretrained model; all weights move; what is returned is what is recorded."""
    folder, scores = finetuned()
    lines = [x for x in json.loads((folder / "trainer_state.json").read_text())["log_history"] if "loss" in x]
    assert len(lines) == 4 and lines[-1]["loss"] < lines[0]["loss"]
    before, after = (AutoModelForCausalLM.from_pretrained(one).state_dict() for one in (model_folder, folder))
    assert all(not torch.equal(before[name], after[name]) for name in before)
    finished = json.loads((folder / "finished.json").read_text())
    assert finished.pop("family")["model_family"] == "tiny"
    assert set(finished) - set(scores) <= {"manifest", "stages"} and scores.items() <= finished.items()
    assert finished["train_loss"] == pytest.approx(sum(x["loss"] for x in lines) / 4, rel=1e-4)


def test_adapters_are_merged(finetuned, model_folder):
    folder, _ = finetuned("--config-name=finetune_lora", "LoRA.r=4", "lr=1e-2")
    before, after = (AutoModelForCausalLM.from_pretrained(one).state_dict() for one in (model_folder, folder))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all("_proj" in name for name in moved) and not (folder / "adapter_config.json").exists()
