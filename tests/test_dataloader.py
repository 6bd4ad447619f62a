"""The Trainer's step: packed is padded, one forward is separate ones, a kept reference is a live one."""

import json

import pytest
import torch
from helpers import ARCHITECTURES, METHODS, WORDS, prepared
from transformers import AutoModelForCausalLM, TrainingArguments
from transformers.utils import is_torchao_available

import data_module
import dataloader
from tofu.methods import objective, rmu
from tofu.models import folders


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
    pieces = -(-len(trainer._collate(samples)["at"]) * WORDS // most)
    assert 2 <= pieces <= len(made) / 2 and "forward" not in vars(head)  # each is made twice: its backward asks again
    assert step(trainer, samples)[0] == pytest.approx(float(whole[0]), rel=1e-5)
    monkeypatch.setattr(dataloader, "LOGITS", 2**27)
    assert torch.equal(step(trainer, samples)[0], whole[0])


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


def test_batches_do_not_depend_on_the_loaders_processes():
    class Slots(torch.utils.data.Dataset):
        def __getitem__(self, slot):
            return slot.epoch * 100 + slot.position

    def batches(workers):
        dealt = data_module.GlobalBatches(41, 4, 1, 2)
        loader = data_module.EpochLoader(Slots(), batch_sampler=dealt, num_workers=workers)
        return [[batch.tolist() for batch in loader] for epoch in range(2) if loader.set_epoch(epoch) is None]

    assert batches(2) == batches(0) and batches(0)[1][0][0] == 101


@pytest.mark.slow
@pytest.mark.skipif(not is_torchao_available(), reason="needs the torchao package, an optional one")
def test_stochastic_rounding_loses_no_update(model_folder, tmp_path, run_script, monkeypatch):
    """bf16 weights at lr 1e-5 arrive on average where float32 ones do: the slope of one path on the other is 1."""

    def moved(name, start, *args):
        common = ("model_family=tiny", "data_path=data/mini", "split=forget10", "engine=ddp", *args)
        common += ("lr=1e-5", "batch_size=10", "num_epochs=3", f"save_dir={tmp_path}/{name}")
        monkeypatch.setattr(folders, "resolve", lambda *_: str(model_folder))
        run_script("finetune.py", *common)
        end = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32).state_dict()
        first = AutoModelForCausalLM.from_pretrained(model_folder, dtype=start).to(torch.float32).state_dict()
        return torch.cat([(end[key] - first[key]).flatten() for key in end])

    by_chance = moved("stochastic", torch.bfloat16, "optim=adamw_8bit_stochastic", "precision=bf16")
    exact = moved("exact", torch.float32, "optim=adamw_torch", "precision=fp32")
    assert ((by_chance * exact).sum() / (exact * exact).sum()).item() == pytest.approx(1, abs=0.1)
    losses_of = lambda name: json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]  # noqa: E731
    assert losses_of("stochastic")[0]["loss"] == pytest.approx(losses_of("exact")[0]["loss"], rel=1e-2)
