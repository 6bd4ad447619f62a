"""A sweep is as many runs as it has jobs: nothing of one is alive in the next."""

import weakref

import pytest
from helpers import MINI

import dataloader
from tofu.models import loading
from tofu.training.job import Job

DIVERGES = ("forget_loss=KL", "LoRA.r=4", "lr=1e-3,1e30,1e-4")


@pytest.mark.parametrize("how", [("forget_loss=KL,rmu,dpo",), pytest.param(DIVERGES, marks=pytest.mark.slow)])
def test_nothing_of_an_earlier_job_is_alive(monkeypatch, run_script, model_folder, tmp_path, how):
    """Models, reference models, trainers and optimisers, where the next job begins; of one that diverged, too."""
    seen, counts, begin, load, fit = [], [], Job.__init__, loading.load, dataloader.fit

    def beginning(self, *args):
        counts.append((len(seen), [one() for one in seen if one() is not None]))
        seen.clear()
        begin(self, *args)

    def loading_one(path, **kwargs):
        model = load(path, **kwargs)
        seen.append(weakref.ref(model))
        return model

    def fitting(trainer):
        trainer.create_optimizer()
        seen.extend(weakref.ref(one) for one in (trainer, trainer.model, trainer.optimizer))
        return fit(trainer)

    monkeypatch.setattr(Job, "__init__", beginning)
    monkeypatch.setattr(loading, "load", loading_one)
    monkeypatch.setattr(dataloader, "fit", fitting)
    monkeypatch.chdir(tmp_path)
    common = ("model_family=tiny", f"data_path={MINI}", f"model_path={model_folder}", "split=forget01")
    common += ("batch_size=2", "gradient_accumulation_steps=1", "num_epochs=2", "save_model=false")
    try:
        run_script("forget.py", "-m", *common, *how, "save_dir='${forget_loss.name}_${lr}'")
    except SystemExit:
        assert "lr=1e-3,1e30,1e-4" in how
    assert [count for count, _ in counts][0] == 0 and len(counts) == 3
    assert all(count >= 4 for count, _ in counts[1:]) and [alive for _, alive in counts] == [[], [], []]
