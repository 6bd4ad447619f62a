"""How processes share the work: what a DeepSpeed config must say."""

import json

import pytest
from helpers import REPO

from tofu.models import engines


@pytest.mark.parametrize("name", ["ds_config.json", "ds_config_zero2.json"])
def test_sums_in_bf16_are_warned_of(monkeypatch, caplog, tmp_path, name):
    """A shipped config has none; of the user's own, what is lacking is named."""
    monkeypatch.setenv("RANK", "0")
    shipped = REPO / "config" / name
    own = json.loads(shipped.read_text())
    del own["data_types"]
    (tmp_path / "own.json").write_text(json.dumps(own))
    for path, precision, said in (
        (shipped, "bf16", 0),
        (tmp_path / "own.json", "fp32", 0),
        (tmp_path / "own.json", "bf16", 1),
    ):
        caplog.clear()
        engines.warn_of_coarse_sums(engines.engine_of("deepspeed", str(path), precision), str(path))
        assert len(caplog.messages) == said
    assert 'own.json lacks "data_types": {"grad_accum_dtype": "fp32"}: without it DeepSpeed sums' in caplog.text


def test_a_card_holds_a_copy_of_sixty_percent_of_it():
    """8e9 weights in bf16 are 16 GB: on a card of 40, and not on one of 24, where the processes share the model."""
    assert engines.holds_a_copy(8 * 10**9, True, 40 * 10**9) and not engines.holds_a_copy(8 * 10**9, True, 24 * 10**9)
    assert engines.holds_a_copy(12 * 10**9, True, 40 * 10**9) and not engines.holds_a_copy(
        12 * 10**9, False, 40 * 10**9
    )


def test_alone_an_evaluation_takes_what_a_training_takes(model_folder):
    args = ("auto", str(REPO / "config" / "ds_config.json"), "fp32")
    assert engines.engine_of_evaluation(*args, str(model_folder)) == engines.engine_of(*args)
