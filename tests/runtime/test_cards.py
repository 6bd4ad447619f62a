"""What a card is given: few shapes, and none of the numbers of a run moves with them."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import MINI

from tofu.evaluation import logs
from tofu.models import families, loading
from tofu.runtime import cards


def test_widths_are_rounded_on_a_card_alone():
    assert [cards.up(n, 16) for n in (0, 1, 16, 17)] == [0, 16, 16, 32] and cards.up(17, 1) == 17
    assert cards.round_to(torch.device("cpu")) == 1 and cards.round_to(torch.device("cuda", 0)) == 16


def test_cudnn_attention_is_off_where_a_model_is_loaded(model_folder):
    torch.backends.cuda.enable_cudnn_sdp(True)
    loading.load(str(model_folder))
    assert not torch.backends.cuda.cudnn_sdp_enabled() and torch.backends.cuda.flash_sdp_enabled()


def test_rounded_widths_make_few_shapes_and_the_same_numbers(monkeypatch, run_script, model_folder, tmp_path):
    """A finetuning and an evaluation: losses to 1e-6, equal generations."""
    plain, shapes = F.scaled_dot_product_attention, set()

    def watched(query, key, *args, **kwargs):
        shapes.add((*query.shape, *key.shape))
        return plain(query, key, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    monkeypatch.chdir(tmp_path)
    common = ("model_family=tiny", f"data_path={MINI}")
    found, counts = [], []
    for to in (1, 16):
        monkeypatch.setattr(cards, "round_to", lambda device, to=to: to)
        shapes.clear()
        training = ("split=full", "num_epochs=1", "lr=1e-3", "batch_size=8", f"save_dir=full{to}")
        with monkeypatch.context() as patch:
            patch.setitem(families.entries()["tiny"], "hf_key", str(model_folder))
            run_script("finetune.py", *common, *training)
        counts.append([len(shapes)])
        assert {shape[2] % to for shape in shapes} == {0}
        shapes.clear()
        evaluation = ("model_path=full1", "split=forget10", "ds_size=30", f"save_dir=eval{to}")
        run_script("evaluate_util.py", *common, *evaluation)
        counts[-1].append(len(shapes))
        assert {shape[6] % to for shape in shapes} == {0}
        lines = json.loads((tmp_path / f"full{to}" / "trainer_state.json").read_text())["log_history"]
        log = json.loads((tmp_path / f"eval{to}" / logs.AGGREGATED).read_text())
        found.append(([line["loss"] for line in lines if "loss" in line], log))
    (losses, log), (rounded, rounded_log) = found
    assert rounded == pytest.approx(losses, abs=1e-6)
    for task, metrics in log.items():
        assert rounded_log[task]["generated_text"] == metrics["generated_text"]
        for name in ("avg_gt_loss", "average_perturb_loss"):
            both = (one[task].get(name, {}) for one in (log, rounded_log))
            values = [np.concatenate([np.atleast_1d(value) for value in one.values()]) for one in both if one]
            assert not values or values[0] == pytest.approx(values[1], abs=1e-6)
    assert counts[1][0] <= counts[0][0] / 5 and counts[1][1] <= counts[0][1] / 2  # 30 and 370; the slots differ too
