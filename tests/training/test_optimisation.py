"""Optimisers and four bits: what they do to a run, what is refused."""

import json
import math

import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM

import utils
from tofu.models import engines, folders, loadable
from tofu.training import optimisation


@pytest.mark.parametrize(("loss", "term", "start"), [("dpo", "loss", 2 / 0.1 * math.log(2)), ("KL", "retain_loss", 0)])
def test_adapters_on_four_bits(model_folder, tmp_path, run_script, loss, term, start):
    """The run starts equal to its reference, which is in four bits too; what is saved is whole, and has moved."""

    args = ("model_family=tiny", "data_path=data/mini", "engine=ddp", f"model_path={model_folder}", "split=forget05")
    args += (f"forget_loss={loss}", "LoRA.r=4", "LoRA.dropout=0", "LoRA.quantize=4bit", "lr=1e-2", "num_epochs=2")
    args += ("batch_size=10", "gradient_accumulation_steps=1", f"save_dir={tmp_path}/run")
    run_script("forget.py", *args)
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert history[0][term] == pytest.approx(start, abs=1e-5) and abs(history[3][term] - start) > 1e-3
    saved, old = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tmp_path / "run", model_folder))
    assert not getattr(saved.config, "quantization_config", None)
    moved = {
        name
        for (name, a), (_, b) in zip(saved.named_parameters(), old.named_parameters(), strict=True)
        if not torch.equal(a, b)
    }
    assert moved == {name for name, _ in old.named_parameters() if "_proj" in name}


def test_four_bits_are_refused_where_they_cannot_be(model_folder, tmp_path):
    with pytest.raises(utils.BadInput, match="LoRA.quantize=4bit does not go with engine=fsdp: take engine=ddp"):
        loadable.check_loadable(str(model_folder), engines.Engine("fsdp", False), None, quantize="4bit")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(model_folder)}))
    with pytest.raises(utils.BadInput, match="does not go with the adapter in .*: take engine=ddp and a whole model"):
        loadable.check_loadable(str(tmp_path), engines.Engine("ddp", False), None, quantize="4bit")


@pytest.mark.parametrize("script", ["finetune", "forget"])
def test_what_needs_a_gpu_is_refused_without(model_folder, tmp_path, run_script, monkeypatch, capsys, script):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for key, said in (
        ("attention=flash_attention_2", "needs the flash_attn package, a CUDA GPU and bf16"),
        ("attention=flex_attention", "needs a CUDA GPU: take attention=sdpa"),
        ("liger_kernel=true", "needs a GPU and the liger-kernel package"),
        ("attention=flash", "attention=flash"),
        ("LoRA.quantize=4bit", "give them a rank, LoRA.r=8 say"),
        ("LoRA.quantize=8bit", "it may be 4bit or null"),
    ):
        args = ("model_family=tiny", "data_path=data/mini", "split=forget10", "engine=ddp", "num_epochs=3", key)
        args += (f"model_path={model_folder}",) if script == "forget" else ()
        monkeypatch.setattr(folders, "resolve", lambda *_: str(model_folder))
        with pytest.raises(SystemExit, match="2"):
            run_script(f"{script}.py", *args, f"save_dir={tmp_path}/run")
        assert said in capsys.readouterr().err and not (tmp_path / "run").exists(), key


def test_trackers_get_the_runs_config(tmp_path):
    """Every tracker of transformers writes these two down."""
    settings = {key: None for key in optimisation.ARGUMENTS} | {"batch_size": 2, "gradient_accumulation_steps": 1}
    settings |= {"num_epochs": 2, "lr": 1e-3, "weight_decay": 0, "max_grad_norm": 0, "optim": "adamw_torch", "seed": 1}
    settings |= {"report_to": OmegaConf.create([]), "progress": False, "logging_steps": 1, "liger_kernel": False}
    engine = engines.Engine("ddp", False)
    made = optimisation.arguments(
        tmp_path, samples=8, engine=engine, gradient_checkpointing=False, **settings | {"torch_compile": False}
    )
    made.tofu = {"forget_loss": {"name": "npo"}}
    assert made.to_dict()["tofu"] == json.loads(made.to_json_string())["tofu"] == {"forget_loss": {"name": "npo"}}
    assert made.report_to == []
