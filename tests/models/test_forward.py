"""A training's forwards: adapters off, and what is refused where blocks or samples cannot be told apart."""

from helpers import make

from tofu.methods import rmu
from tofu.models import forward, loading


def test_adapters_that_are_frozen_stay_so():
    """Switching adapters off for the reference and on again lets peft train all of them; the method's choice stands."""
    model = loading.add_lora(make("Llama"), r=2, alpha=2, dropout=0.0)
    rmu.train_only(model, 1, 1)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 and all("layers.1.mlp.down_proj.lora_" in name for name in trained)
    with forward.adapter_off(model):
        pass
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trained
