"""The memory of a step: estimated from the config, counted at every operation of a real step."""

import pytest
import torch
import transformers
from helpers import ARCHITECTURES, checked, read_table
from live_bytes import LiveBytes, saved_bytes

import data_module
import dataloader
from tofu.methods import objective
from tofu.models import families, folders, loading, sizes
from tofu.models.engines import Engine
from tofu.training import estimate, forecast, optimisation
from tofu.training.estimate import Setting

FP32, BF16 = torch.float32, torch.bfloat16
MODES = {  # how a model computes -> whether in bf16, the type of its weights
    "float32": (False, FP32),
    "autocast": (True, FP32),
    "bf16 weights": (True, BF16),
}


def setting(mode: str = "float32", **more) -> Setting:
    half, weights = MODES[mode]
    return Setting(
        **{"engine": Engine("ddp", half), "processes": 1, "optim": forecast.FUSED, "weights": weights} | more
    )


def config(name: str = "Llama", layers: int = 2, **more) -> transformers.PretrainedConfig:
    known = {**ARCHITECTURES[name], "hidden_size": 64, "num_hidden_layers": layers, "intermediate_size": 160}
    return getattr(transformers, f"{name}Config")(**known | more)


def kept_per_token(config, mode: str, rank: int = 0, width: int = 64) -> float:
    """Bytes per token that a forward keeps, out of two forwards: what does not grow with the tokens is left out."""
    half, weights = MODES[mode]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).to(weights)
    if rank:
        model = loading.add_lora(model, r=rank, alpha=8, dropout=0.0)
    found = []
    for rows in (1, 3):
        ids = torch.randint(3, 40, (rows, width))
        positions = torch.arange(width // 2).repeat(rows, 2)  # two packed samples in a row

        def forward(ids=ids, positions=positions):
            with torch.autocast("cpu", BF16, enabled=half):
                return model(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=1).logits

        found.append(saved_bytes(model.train(), forward))
    return (found[1] - found[0]) / (2 * width)


def kept_by_a_block(name: str, mode: str, rank: int = 0, **more) -> float:
    deep, flat = (kept_per_token(config(name, layers, **more), mode, rank) for layers in (3, 2))
    return deep - flat


def estimated(name: str, mode: str, rank: int = 0, **more) -> float:
    counted = sizes.sizes_of(sizes.shell(config(name, **more)))
    return estimate.per_token(counted, setting(mode, rank=rank), 64)


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("mode", MODES)
def test_what_a_block_keeps(mode, rank):
    """To 1 % of what the saved tensors of a Llama take, with grouped heads and heads wider than the hidden size."""
    shape = {"head_dim": 32, "num_key_value_heads": 2}
    assert estimated("Llama", mode, rank, **shape) == pytest.approx(kept_by_a_block("Llama", mode, rank, **shape), 0.01)


OTHERS = [
    pytest.param(name, mode, marks=() if mode == "autocast" else pytest.mark.slow)
    for name in ARCHITECTURES
    for mode in MODES
    if name != "Llama"
]


@pytest.mark.parametrize(("name", "mode"), OTHERS)
def test_what_a_block_of_another_architecture_keeps(name, mode):
    assert estimated(name, mode) == pytest.approx(kept_by_a_block(name, mode), 0.15)


def test_llama_1b_keeps_66_bytes_per_token_layer_and_hidden_unit():
    """Its shape, an eighth as wide: 66 over float32 weights, 56 over bf16 ones, 104 in float32, without the mask."""
    shape = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 32, "num_key_value_heads": 8}
    for mode, expected in (("autocast", 66), ("bf16 weights", 56), ("float32", 104)):
        found = kept_by_a_block("Llama", mode, **shape)
        computed = 4 if mode == "float32" else 2
        assert (found - 64 * computed - 4 * 32) / 256 == pytest.approx(expected, 0.002)


@pytest.fixture
def step(model_folder, tmp_path):
    """Train some steps for real: the most bytes alive in the second one, and what was estimated beforehand."""
    tokenizer, defaults = folders.load_tokenizer(str(model_folder), None), checked("finetune")

    def go(shape, *, method=None, checkpointing=False, accumulation=1, batch_size=4, optim=forecast.FUSED, half=False):
        one = config(**{"vocab_size": 300} | shape)
        terms = objective.finetuning() if method is None else objective.method_of(checked("forget", method).forget_loss)
        live = "live" in objective.needs_of(terms.terms)
        rows = {"retain": read_table("retain90" if method else "full")[:4]}
        rows |= {"forget": read_table("forget10")[:4]} if method else {}
        data = data_module.TrainingSet(tokenizer, families.family("tiny"), 500, 0, **rows)
        engine, counted = Engine("ddp", half), sizes.sizes_of(sizes.shell(one))
        batch = forecast.widest(data, terms, batch_size, accumulation, 1, dataloader.ROW)
        told = estimate.estimate(
            counted,
            Setting(
                engine,
                1,
                optim,
                FP32,
                checkpointing=checkpointing,
                accumulation=accumulation,
                compares="live" if live else "none",
                reference=FP32 if live else None,
            ),
            batch,
        )
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(one)
        reference = transformers.AutoModelForCausalLM.from_config(one).requires_grad_(False).eval() if live else None
        keys = {key: defaults[key] for key in optimisation.ARGUMENTS}
        keys |= {"batch_size": batch_size, "gradient_accumulation_steps": accumulation, "num_epochs": 3}
        keys |= {"optim": optim, "progress": False}
        args = optimisation.arguments(
            tmp_path,
            samples=len(data),
            engine=engine,
            gradient_checkpointing=checkpointing,
            **keys | {"progress": False},
        )
        seen = Watch(model, reference)
        trainer = dataloader.TofuTrainer(
            model=model, args=args, train_dataset=data, method=terms, reference=reference, callbacks=[seen]
        )
        trainer.train()
        return seen.live.peak, told

    return go


class Watch(transformers.TrainerCallback):
    """Counts live bytes in the second step, when the optimiser has its states."""

    def __init__(self, *models) -> None:
        self.models, self.live = models, LiveBytes()

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step == 1:
            self.live.__enter__()
            held = [one for model in self.models if model is not None for one in model.parameters()]
            held += [one for states in kwargs["optimizer"].state.values() for one in states.values()]
            self.live.hold(*(one for one in held if isinstance(one, torch.Tensor)))

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == 2:
            self.live.__exit__(None, None, None)


SHAPES = [
    {"hidden_size": 64, "intermediate_size": 256, "vocab_size": 2000},
    {"hidden_size": 128, "intermediate_size": 352, "layers": 4, "vocab_size": 4000, "tie_word_embeddings": True},
    {"hidden_size": 256, "intermediate_size": 1024, "layers": 3, "vocab_size": 8000, "num_attention_heads": 8},
]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=["64", "128", "256"])
def test_the_peak_of_a_step(step, shape, checkpointing):
    """15 % are promised; at these sizes it is 0 to 4 %."""
    live, told = step(shape, checkpointing=checkpointing)
    assert told.peak == pytest.approx(live, 0.08)


CASES = {
    "reference": {"method": "forget_loss=KL"},
    "accumulation": {"method": "forget_loss=grad_diff", "accumulation": 2, "batch_size": 2},
    "embeddings": {"batch_size": 1},
    "autocast": {"half": True},
    "autocast again": {"half": True, "checkpointing": True},
    "pieces": {"pieces": True},
    "states in 8 bits": {"optim": "adamw_bnb_8bit"},
}


FAST = ("reference", "accumulation")


@pytest.mark.parametrize("case", [pytest.param(one, marks=() if one in FAST else pytest.mark.slow) for one in CASES])
def test_the_peak_of_other_steps(step, monkeypatch, case):
    given = dict(CASES[case])
    if given.pop("pieces", False):
        monkeypatch.setattr(dataloader, "LOGITS", 4000 * 80)
    live, told = step(SHAPES[1], **given)
    assert told.peak == pytest.approx(live, 0.15)
