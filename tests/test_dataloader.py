"""The Trainer's step: packed is padded, one forward is separate ones, a kept reference is a live one."""

import dataclasses
import importlib
import json
import math

import pytest
import torch
from test_configs import METHODS, NEEDED, checked
from test_inference import ARCHITECTURES, WORDS, make, rows
from transformers import AutoModelForCausalLM, TrainingArguments
from transformers.utils import is_torchao_available

import data_module
import dataloader
import utils
from tofu.methods import losses, objective, references, rmu
from tofu.models import architectures, engines, folders, forward, loadable, loading
from tofu.runtime import run_folder


def items():
    """Four pairs of samples of several lengths, the last a filler of an uneven batch."""
    drawn = [sample for seed in range(4) for samples in rows(seed) for sample in samples[:2]]
    parts = {"forget": drawn[:4], "retain": drawn[8:12], "idk": drawn[16:20]}
    return [({name: part[i] for name, part in parts.items()}, float(i < 3)) for i in range(4)]


def trainer_of(model, terms, folder, **kwargs):
    args = TrainingArguments(output_dir=str(folder), use_cpu=True, report_to="none", per_device_train_batch_size=4)
    method = objective.Method(terms)
    if any(term.contract.states for term in terms):
        method.block, method.tensors = 0, {"control": rmu.control_vector(model.config.hidden_size, 0)}
    return dataloader.TofuTrainer(model=model, args=args, train_dataset=[0], method=method, **kwargs)


def step(trainer, samples):
    """The loss of one step and its gradients."""
    trainer.model.zero_grad()
    batch = trainer._collate(samples)
    loss = trainer.compute_loss(
        trainer.model, batch, num_items_in_batch=trainer._get_num_items_in_batch([batch], torch.device("cpu"))
    )
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


def gentle(term):
    """Numbers with which a random model's gradient is large enough to be compared."""
    args = {"simnpo": {"beta": 0.2}, "satimp": {"beta1": 0.1, "beta2": 0.1}, "wga": {"beta": 0.1}}
    return args.get(term.function.__name__, {})


def prepared(name, method):
    terms = objective.finetuning().terms
    if method != "finetune":
        terms = objective.terms_of(checked("forget", f"forget_loss={method}", *NEEDED.get(method, [])).forget_loss)
    terms = [dataclasses.replace(term, args={**term.args, **gentle(term)}) for term in terms]
    model, reference = make(name), make(name)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    if any(term.contract.states for term in terms):
        rmu.train_only(model, 0, 1)
    samples = items()
    everything = sorted({sample for parts, _ in samples for sample in parts.values()})
    logps = references.reference_logps(reference, everything, 3, False)
    return model, reference, terms, samples, logps


def assert_same(got, expected):
    torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-5)
    assert got[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(got[1][name], gradient, rtol=1e-5, atol=1e-5 * max(1, float(gradient.abs().max())))


# every method on one architecture, and on the others those that differ in views and references
VIEWS = ("finetune", "KL", "dpo", "idk", "rmu", "undial")
MATRIX = [
    pytest.param(name, method, marks=() if name == "Llama" or method in VIEWS else pytest.mark.slow)
    for name in ARCHITECTURES
    for method in ("finetune", *METHODS)
]


@pytest.mark.parametrize(("name", "method"), MATRIX)
def test_packed_is_padded(monkeypatch, tmp_path, name, method):
    """The same loss and gradients, to 1e-5, for every objective and architecture; in several rows and in one."""
    model, reference, terms, samples, logps = prepared(name, method)
    padded = step(trainer_of(model, terms, tmp_path, reference=reference, logps=logps, packing=False), samples)
    for row in (30, data_module.ONE_ROW):
        monkeypatch.setattr(dataloader, "ROW", row)
        assert_same(step(trainer_of(model, terms, tmp_path, reference=reference, logps=logps), samples), padded)
    assert max(float(gradient.abs().max()) for gradient in padded[1].values()) > 1e-4


@pytest.mark.parametrize("method", ["finetune", "KL", "dpo", "idk"])
@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_logits_in_pieces_are_the_whole_ones(monkeypatch, tmp_path, name, method):
    """Where the logits of a batch would be too many: the same loss and gradients."""
    model, reference, terms, samples, logps = prepared(name, method)
    trainer = trainer_of(model, terms, tmp_path, reference=reference, logps=logps)
    whole = step(trainer, samples)
    most, seen = 20 * WORDS, []
    monkeypatch.setattr(dataloader, "LOGITS", most)
    head = model.get_output_embeddings()
    handle = head.register_forward_hook(lambda module, args, logits: seen.append(logits.numel()))
    assert_same(step(trainer, samples), whole)
    handle.remove()
    made = [size for size in seen if size % WORDS == 0]
    pieces = -(-int(trainer._collate(samples)["keep"].sum()) * WORDS // most)
    assert 2 <= pieces <= len(made) / 2 and "forward" not in vars(head)  # each is made twice: its backward asks again
    assert step(trainer, samples)[0] == pytest.approx(float(whole[0]), rel=1e-5)
    monkeypatch.setattr(dataloader, "LOGITS", 2**27)
    assert torch.equal(step(trainer, samples)[0], whole[0])


def test_adapters_that_are_frozen_stay_so():
    """Switching adapters off for the reference and on again lets peft train all of them; the method's choice stands."""
    model = loading.add_lora(make("Llama"), r=2, alpha=2, dropout=0.0)
    rmu.train_only(model, 1, 1)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 and all("layers.1.mlp.down_proj.lora_" in name for name in trained)
    with forward.adapter_off(model):
        pass
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trained


def test_flash_attention_gets_one_row():
    """It tells samples apart by their positions in a batch of one row only."""
    config = make("Llama").config
    config._attn_implementation = "flash_attention_2"
    assert dataloader.row_of(config) == data_module.ONE_ROW


@pytest.mark.parametrize("method", ["grad_diff", "idk"])
def test_one_forward_is_separate_ones(tmp_path, method):
    """All parts in one batch of packed rows, against a plain forward of each sample by itself."""
    model, _, terms, samples, _ = prepared("Llama", method)
    parts = objective.parts_of(terms)
    got = step(trainer_of(model, terms, tmp_path), samples)
    model.zero_grad()
    nll = {part: [] for part in parts}
    for held, weight in samples:
        for part in parts:
            ids, targets = (torch.tensor([list(values)]) for values in held[part][:2])
            each = torch.nn.functional.cross_entropy(model(ids).logits[0], targets[0], reduction="none")
            if weight:
                nll[part].append(each[targets[0] != data_module.IGNORE])
    if method == "idk":
        loss = torch.cat(nll["idk"] + nll["retain"]).mean()
    else:
        loss = torch.cat(nll["retain"]).mean() - torch.cat(nll["forget"]).mean()
    loss.backward()
    assert_same(got, (loss.detach(), {name: p.grad for name, p in model.named_parameters()}))


def test_kept_log_probabilities_are_live_ones(tmp_path):
    """What is written is read back for the same samples and model and made anew for others; it is a live forward's."""
    _, reference, terms, samples, logps = prepared("Llama", "dpo")
    for sample, value in logps.items():
        with torch.no_grad():
            view = forward.score(reference, data_module.collate({"forget": [sample]}, row=100))["forget"]
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


def test_a_run_that_replaces_another_uses_its_log_probabilities(model_folder, tmp_path, monkeypatch):
    """The second run loads no starting model and has the same losses; another precision makes them anew."""
    import forget

    args = ("model_family=tiny", "data_path=data/mini", "engine=ddp", f"model_path={model_folder}", "split=forget05")
    args += ("forget_loss=dpo", "batch_size=10", "gradient_accumulation_steps=1", "num_epochs=2", "lr=1e-3")
    loaded, load = [], loading.load_frozen
    monkeypatch.setattr(loading, "load_frozen", lambda *a, **k: loaded.append(1) or load(*a, **k))

    def run(*more):
        monkeypatch.setattr("sys.argv", ["forget.py", *args, f"save_dir={tmp_path}/run", "overwrite_dir=true", *more])
        forget.main()
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


def test_batches_do_not_depend_on_the_loaders_processes():
    class Slots(torch.utils.data.Dataset):
        def __getitem__(self, slot):
            return slot.epoch * 100 + slot.position

    def batches(workers):
        dealt = data_module.GlobalBatches(41, 4, 1, 2)
        loader = data_module.EpochLoader(Slots(), batch_sampler=dealt, num_workers=workers)
        return [[batch.tolist() for batch in loader] for epoch in range(2) if loader.set_epoch(epoch) is None]

    assert batches(2) == batches(0) and batches(0)[1][0][0] == 101


def test_a_model_that_is_not_all_attention_is_not_packed(tmp_path):
    """One has linear attention, which knows no positions; one numbers positions by itself; one has no attention."""
    engine = engines.Engine("ddp", False)
    for kind in ("qwen3_next", "opt", "rwkv"):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
        with pytest.raises(utils.BadInput, match=f"packed samples of {kind} see each other.*: take packing=false"):
            loadable.check_loadable(str(tmp_path), engine, packing=True)
        loadable.check_loadable(str(tmp_path), engine, weights=False)
    assert {make(name).config.model_type for name in ARCHITECTURES} == set(architectures.PACKABLE)


def test_an_attention_that_a_model_lacks_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma2"}))
    with pytest.raises(utils.BadInput, match="attention=sdpa: gemma2 has no such attention: take attention=auto"):
        loadable.check_loadable(str(tmp_path), engines.Engine("ddp", False), "sdpa")
    loadable.check_loadable(str(tmp_path), engines.Engine("ddp", False), "eager", weights=False)


@pytest.mark.parametrize(("loss", "term", "start"), [("dpo", "loss", 2 / 0.1 * math.log(2)), ("KL", "retain_loss", 0)])
def test_adapters_on_four_bits(model_folder, tmp_path, monkeypatch, loss, term, start):
    """The run starts equal to its reference, which is in four bits too; what is saved is whole, and has moved."""
    import forget

    args = ("model_family=tiny", "data_path=data/mini", "engine=ddp", f"model_path={model_folder}", "split=forget05")
    args += (f"forget_loss={loss}", "LoRA.r=4", "LoRA.dropout=0", "LoRA.quantize=4bit", "lr=1e-2", "num_epochs=2")
    args += ("batch_size=10", "gradient_accumulation_steps=1", f"save_dir={tmp_path}/run")
    monkeypatch.setattr("sys.argv", ["forget.py", *args])
    forget.main()
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
def test_what_needs_a_gpu_is_refused_without(model_folder, tmp_path, monkeypatch, capsys, script):
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
        monkeypatch.setattr("sys.argv", [f"{script}.py", *args, f"save_dir={tmp_path}/run"])
        monkeypatch.setattr(folders, "resolve", lambda *_: str(model_folder))
        with pytest.raises(SystemExit, match="2"):
            importlib.import_module(script).main()
        assert said in capsys.readouterr().err and not (tmp_path / "run").exists(), key


@pytest.mark.slow
@pytest.mark.skipif(not is_torchao_available(), reason="needs the torchao package, an optional one")
def test_stochastic_rounding_loses_no_update(model_folder, tmp_path, monkeypatch):
    """bf16 weights at lr 1e-5 arrive on average where float32 ones do: the slope of one path on the other is 1."""
    import finetune

    def moved(name, start, *args):
        common = ("model_family=tiny", "data_path=data/mini", "split=forget10", "engine=ddp", *args)
        common += ("lr=1e-5", "batch_size=10", "num_epochs=3", f"save_dir={tmp_path}/{name}")
        monkeypatch.setattr("sys.argv", ["finetune.py", *common])
        monkeypatch.setattr(folders, "resolve", lambda *_: str(model_folder))
        finetune.main()
        end = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32).state_dict()
        first = AutoModelForCausalLM.from_pretrained(model_folder, dtype=start).to(torch.float32).state_dict()
        return torch.cat([(end[key] - first[key]).flatten() for key in end])

    by_chance = moved("stochastic", torch.bfloat16, "optim=adamw_8bit_stochastic", "precision=bf16")
    exact = moved("exact", torch.float32, "optim=adamw_torch", "precision=fp32")
    assert ((by_chance * exact).sum() / (exact * exact).sum()).item() == pytest.approx(1, abs=0.1)
    losses_of = lambda name: json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]  # noqa: E731
    assert losses_of("stochastic")[0]["loss"] == pytest.approx(losses_of("exact")[0]["loss"], rel=1e-2)
