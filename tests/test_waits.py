"""How often a training step makes a GPU's host wait, counted by the operations that do so, on a CPU."""

from collections import Counter

import pytest
import torch
from helpers import METHODS, WORDS, prepared
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainingArguments

import dataloader
from tofu.methods import objective

MOST = 7  # of transformers' own code in a step of its own
READS = {"aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.bincount", "aten.is_nonzero"}
SIZED = {"aten.index", "aten.index_put", "aten.index_put_", "aten._unsafe_index"}  # by a mask: how many are there?


class Waits(TorchDispatchMode):
    """Counts them by the phase of the step."""

    def __init__(self):
        super().__init__()
        self.phase, self.found = "before", Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func.overloadpacket)
        indices = args[1] if name in SIZED and isinstance(args[1], list | tuple) else ()
        repeats = name == "aten.repeat_interleave" and not (kwargs or {}).get("output_size")
        if name in READS or repeats or any(one is not None and one.dtype == torch.bool for one in indices):
            self.found[self.phase] += 1
        return func(*args, **(kwargs or {}))

    def __enter__(self):
        """Copies to the host, too, which no operation tells on a CPU."""
        self.patch = pytest.MonkeyPatch()
        for name in ("tolist", "numpy", "cpu"):
            self.patch.setattr(torch.Tensor, name, self.counted(getattr(torch.Tensor, name)))
        return super().__enter__()

    def __exit__(self, *error):
        self.patch.undo()
        return super().__exit__(*error)

    def counted(self, copy):
        def counting(tensor, *args, **kwargs):
            self.found[self.phase] += 1
            return copy(tensor, *args, **kwargs)

        return counting


class Counted(dataloader.TofuTrainer):
    """A trainer whose batches are made beforehand, as a GPU's loader processes make them."""

    def get_train_dataloader(self):
        self.waits = Waits()
        return list(super().get_train_dataloader())

    def compute_loss(self, model, *args, **kwargs):
        handle = model.register_forward_hook(lambda *a: setattr(self.waits, "phase", "between"))
        loss = super().compute_loss(model, *args, **kwargs)
        loss.register_hook(lambda gradient: setattr(self.waits, "phase", "backward"))
        handle.remove()
        return loss

    def before_update(self):
        self.waits.phase = "after"
        super().before_update()

    def log(self, logs, start_time=None):
        super().log(logs, start_time)
        self.waits.phase = "before"
        self.lines = [*getattr(self, "lines", []), Counter(self.waits.found)]


class Rows(torch.utils.data.Dataset):
    """The samples of `prepared`, for whatever place is asked."""

    def __init__(self, samples):
        self.samples = [parts for parts, _ in samples]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, slot):
        return self.samples[slot.position], slot.weight


def waits_of_steps(method, folder, cut=1):
    """Of the second step and of the third, of so many micro-batches: phase -> waits."""
    model, reference, terms, samples, logps = prepared("Llama", method)
    args = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        report_to="none",
        per_device_train_batch_size=len(samples) // cut,
        gradient_accumulation_steps=cut,
        logging_steps=1,
        max_steps=3,
        max_grad_norm=0,
        logging_nan_inf_filter=False,
        save_strategy="no",
        optim="adamw_torch_fused",
        disable_tqdm=True,
    )
    whole = objective.Method(terms)
    if any(term.contract.states for term in terms):
        whole.block, whole.tensors = 0, {"control": torch.ones(model.config.hidden_size)}
    given = {"model": model, "args": args, "train_dataset": Rows(samples), "method": whole}
    trainer = Counted(**given, reference=reference, logps=logps)
    loader = trainer.get_train_dataloader()
    trainer.get_train_dataloader = lambda: loader
    with trainer.waits:
        trainer.train()
    first, second, third, *_ = trainer.lines
    return second - first, third - second


def test_what_counts():
    x = torch.arange(4.0)
    with Waits() as waits:
        waits.phase = "here"
        for wait in (
            lambda: x[x > 1],
            lambda: x.index_put_((x > 1,), torch.tensor(0.0)),
            lambda: float(x.max()),
            lambda: bool((x > 1).all()),
            lambda: x.nonzero(),
            lambda: x.tolist(),
            lambda: torch.bincount(x.long()),
            lambda: torch.repeat_interleave(x, torch.ones(4, dtype=torch.long)),
        ):
            before = waits.found["here"]
            wait()
            assert waits.found["here"] == before + 1
        before = Counter(waits.found)
        assert x[torch.tensor([1, 2])].shape == (2,) and x.masked_fill(x > 1, 0.0).shape == (4,)
        assert waits.found == before


@pytest.mark.parametrize("method", ["finetune", *METHODS])
def test_a_step_waits_seven_times_at_most(tmp_path, method):
    """None of it between forward and backward, where it would leave the GPU without work."""
    for waits in waits_of_steps(method, tmp_path):
        assert 3 <= sum(waits.values()) <= MOST and not waits["between"] and not waits["backward"], waits


@pytest.mark.parametrize("method", ["finetune", "KL"])
def test_so_does_one_whose_logits_are_made_in_pieces(monkeypatch, tmp_path, method):
    monkeypatch.setattr(dataloader, "LOGITS", 20 * WORDS)
    for waits in waits_of_steps(method, tmp_path):
        assert sum(waits.values()) <= MOST and not waits["between"] and not waits["backward"], waits


@pytest.mark.parametrize(("method", "forwards"), [("finetune", 1), ("npo", 1), ("KL", 2)])
def test_a_further_micro_batch_waits_once_a_forward(tmp_path, method, forwards):
    """Where transformers makes the masks: it asks whether samples are packed."""
    one, four = (waits_of_steps(method, tmp_path, cut)[0] for cut in (1, 4))
    assert sum(four.values()) - sum(one.values()) == 3 * forwards
