"""What a run says of its memory before it loads anything, what is refused, and which optimiser is taken."""

import logging
import shutil
from itertools import product

import pytest
import torch
import transformers
from helpers import MINI, checked, read_table
from transformers import LlamaConfig, Trainer

import data_module
import dataloader
from tofu.methods import objective
from tofu.models import batches, families, folders, sizes
from tofu.models.engines import Engine
from tofu.training import estimate, forecast, optimisation
from tofu.training.estimate import Batch, Setting
from utils import BadInput

GB = 10**9
LLAMA_8B = {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
LLAMA_8B |= {"num_attention_heads": 32, "num_key_value_heads": 8}
BATCH = Batch(5, 250, 850, 16)
ZERO3 = {"zero_optimization": {"stage": 3}}


@pytest.fixture(scope="module")
def large() -> sizes.Sizes:
    return sizes.sizes_of(sizes.shell(LlamaConfig(**LLAMA_8B)))


def setting(engine: str = "ddp", processes: int = 1, stage: int | None = None, **more) -> Setting:
    config = None if stage is None else {"zero_optimization": {"stage": stage}}
    given = {"optim": forecast.FUSED, "weights": torch.float32, "cuda": True} | more
    return Setting(Engine(engine, True, config), processes, **given)


def test_sizes_of_an_8b_model(large):
    """Its published count, and what of it four bits and autocast work on; nothing of it was ever in memory."""
    assert large.weights == 8_030_261_248 and large.linear == large.matrices == 6_979_321_856
    assert large.embedding == large.head == 128256 * 4096
    assert (large.queries, large.copies, large.experts, large.linears, large.readers) == (4096, 4, 0, 7, 5)


def test_a_mixture_counts_all_weights_and_the_experts_in_use():
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    shape |= {"vocab_size": 100, "moe_intermediate_size": 16, "num_experts_per_tok": 2, "head_dim": 16}
    few, many = (
        sizes.sizes_of(sizes.shell(transformers.Qwen3MoeConfig(**shape, num_experts=count))) for count in (4, 32)
    )
    assert many.weights > 3 * few.weights and few.experts == many.experts == 2
    assert estimate.per_token(few, setting(), 64) == estimate.per_token(many, setting(), 64)


@pytest.mark.parametrize(
    ("given", "weights", "gradients", "states"),
    [
        (setting(), 4, 4, 8),
        (setting(processes=8), 4, 4, 8),
        (setting("fsdp", 8), 4 / 8, 4 / 8, 8 / 8),
        (setting("deepspeed", 8, 3), 6 / 8, 4 / 8, 8 / 8),
        (setting("deepspeed", 8, 2), 2 + 4 / 8, 4 / 8, 8 / 8),
        (setting(optim="adamw_8bit_stochastic", weights=torch.bfloat16), 2, 2, 2 * (1 + 4 / 256)),
        (setting(optim="sgd"), 4, 4, 0),
        (setting(optim="lion_32bit"), 4, 4, 4),
        (setting(weights=torch.bfloat16, rank=8), 2, 0, 0),
    ],
)
def test_bytes_per_weight(large, given, weights, gradients, states):
    """Of each engine and kind of training; adapters have below 1 % of the weights."""
    found = estimate.estimate(large, given, BATCH)
    for part, expected in (("weights", weights), ("gradients", gradients), ("states", states)):
        assert getattr(found, part) / large.weights == pytest.approx(expected, abs=0.05), part


def test_four_bits_and_adapters(large):
    adapters = setting(weights=torch.bfloat16, rank=8)
    base = 6_979_321_856 * (0.5 + 1 / 64 + 4 / 16384) + 2 * (8_030_261_248 - 6_979_321_856)
    trained = 8 * 32 * (4096 * 2 * 2 + (4096 + 1024) * 2 + (4096 + 14336) * 3)
    found = estimate.estimate(large, adapters._replace(quantize="4bit"), BATCH)
    assert found.weights == pytest.approx(base + 4 * trained, rel=1e-6)
    assert (found.gradients, found.states) == (4 * trained, 8 * trained)


def test_embeddings_have_states_in_32_bits(tmp_path, model_folder):
    """Under bitsandbytes' 8-bit AdamW: counted in the states that it makes for a real model."""
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    how = {"optim": "adamw_bnb_8bit", "use_cpu": True, "report_to": "none"}
    args = transformers.TrainingArguments(output_dir=str(tmp_path), **how)
    trainer = Trainer(model=model, args=args)
    optimizer = trainer.create_optimizer()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    states = optimizer.state[model.get_input_embeddings().weight]
    assert states["state1"].dtype == torch.float32
    assert estimate.states_per_weight("adamw_bnb_8bit", 4, embedding=True) == 8
    head = optimizer.state[model.get_output_embeddings().weight]
    assert head["state1"].dtype == torch.uint8
    held = sum(head[name].nbytes for name in ("state1", "state2", "absmax1", "absmax2"))
    assert held / head["state1"].numel() == pytest.approx(estimate.states_per_weight("adamw_bnb_8bit", 4), rel=0.01)


METHODS = ("finetune", "forget_loss=KL", "forget_loss=idk", "forget_loss=rmu")


@pytest.mark.parametrize("row", [dataloader.ROW, data_module.ONE_ROW, None])
@pytest.mark.parametrize("method", METHODS)
def test_the_widest_micro_batch(model_folder, method, row):
    """The shape and the scored positions of the batches that are really made, the largest of an epoch of both ranks."""
    tokenizer, finetunes = folders.load_tokenizer(str(model_folder), None), method == "finetune"
    chosen = objective.finetuning() if finetunes else objective.method_of(checked("forget", method).forget_loss)
    parts = objective.parts_of(chosen.terms)
    rows = {"retain": read_table("retain90")} | ({} if finetunes else {"forget": read_table("forget10")[:13]})
    refusals = ["I do not know.", "No."] if "idk" in parts else None
    data = data_module.TrainingSet(tokenizer, families.family("tiny"), 500, 0, refusals=refusals, **rows)
    kinds = [(part, kind) for term in chosen.terms for part, kind in term.contract.parts.items()]
    of = lambda wanted: frozenset(part for part, kind in kinds if kind == wanted)  # noqa: E731
    made = []
    for rank in range(2):
        for slots in data_module.GlobalBatches(len(data), 3, rank, 2, 2, None if row else data.length):
            held = {part: [data[slot][0][part] for slot in slots] for part in parts}
            made.append(batches.collate(held, None, of("attended"), row, of("states")))
    found = forecast.widest(data, chosen, 3, 2, 2, row)
    assert found.rows * found.width == max(batch["input_ids"].numel() for batch in made)
    assert (found.rows, found.width) in {tuple(batch["input_ids"].shape) for batch in made}
    states = of("states")
    scored = [
        sum(sum(block.lengths) for part, block in batch["blocks"].items() if part not in states) for batch in made
    ]
    assert (found.scored, found.samples) == (max(scored), 3)


@pytest.mark.parametrize(
    ("card", "expected"),
    [(24, "LoRA.r=8 with gradient_checkpointing: true in "), (60, "optim=adamw_8bit_stochastic (48.4 GB)"), (200, "")],
)
def test_what_fits_a_card(large, card, expected):
    """An 8B model on the cards that there are: each alternative that is named fits by its own estimate."""
    given = setting()
    found = forecast.Forecast(large, given, BATCH, estimate.estimate(large, given, BATCH), card * GB)
    if not expected:
        return forecast.refuse(found)
    with pytest.raises(BadInput) as refused:
        forecast.refuse(found)
    said = str(refused.value)
    assert (
        f"the card has {card}.0 GB, 2.0 GB of which CUDA itself needs: what fits: " in said
        and expected in said
        and "GPUs with engine=deepspeed" in said
    )
    assert "LoRA.r=8 LoRA.quantize=4bit (" in said and "\n" not in said
    assert all(peak <= (card - 2) * GB for _, peak in forecast.alternatives(large, given, BATCH, card * GB))


def test_smaller_batches_fit_where_activations_do_not(large):
    """And checkpointing; on a card where nothing fits, that is said."""
    given, wide = setting(weights=torch.bfloat16, rank=8), Batch(40, 256, 8000, 128)
    words = [words for words, _ in forecast.alternatives(large, given, wide, 40 * GB)]
    assert words[0] == forecast.CHECKPOINTING and any(one.startswith("batch_size=") for one in words)
    cut = next(one for one in words if one.startswith("batch_size="))
    size, steps = (int(one.split("=")[1]) for one in cut.split())
    assert size * steps == 128 and not any(one.startswith("optim=") or one == "LoRA.r=8" for one in words)
    assert forecast.alternatives(large, given, wide, GB) == []
    nothing = forecast.Forecast(large, given, wide, estimate.estimate(large, given, wide), GB)
    with pytest.raises(BadInput, match="take a smaller model"):
        forecast.refuse(nothing)


def test_paged_states_are_among_what_fits(large):
    words = [words for words, _ in forecast.alternatives(large, setting(), BATCH, 80 * GB)]
    assert "optim=paged_adamw_32bit, which needs bitsandbytes, outside of sweeps" in words
    assert "optim=adamw_bnb_8bit, which needs bitsandbytes" not in words  # 85 GB


def test_best_optim():
    """Paged only where one process with bitsandbytes does not fit its card outside of a sweep."""
    keys = ("cuda", "fits", "sweep", "bitsandbytes")
    for engine, processes, *values in product(("ddp", "deepspeed", "fsdp"), (1, 2), *[(False, True)] * 4):
        paged = (engine, processes, *values) == ("ddp", 1, True, False, False, True)
        found = optimisation.best_optim(engine, processes, **dict(zip(keys, values, strict=True)))
        assert found == ("paged_adamw_32bit" if paged else "adamw_torch_fused")


def test_paged_states_are_not_on_the_card(large):
    fused, paged = (
        estimate.estimate(large, setting(optim=name), BATCH) for name in (forecast.FUSED, "paged_adamw_32bit")
    )
    assert paged.states == fused.states and paged.paged and paged.peak == fused.peak - fused.states


@pytest.fixture
def forgets(run_script, model_folder, tmp_path, monkeypatch):
    """forget.py from a folder with config and tokenizer alone; what main returned."""
    bare = tmp_path / "bare"
    shutil.copytree(model_folder, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    monkeypatch.chdir(tmp_path)

    def go(*args):
        common = ("model_family=tiny", f"data_path={MINI}", "split=forget10", f"model_path={bare}", "batch_size=8")
        return run_script("forget.py", *common, *args)

    return go


def test_a_dry_run_needs_no_weights_and_leaves_nothing(forgets, tmp_path, capsys):
    """It says each part and returns the bytes."""
    found = forgets("forget_loss=KL", "dry_run=true", "save_dir=run")
    out = capsys.readouterr().out
    assert found["peak"] > found["activations"] > 0 and found["reference"] == found["weights"] == 4 * 39840
    lines = dict(line.split(None, 1) for line in out.splitlines() if line.startswith("  "))
    assert set(lines) == {"family", "trained", "engine", "optimiser", "micro-batch", *forecast.PARTS, "peak"}
    assert lines["optimiser"] == "adamw_torch_fused" and lines["engine"] == "ddp, fp32, 1 process"
    assert lines["reference"] == "0.2 MB (live)" and lines["peak"].endswith("MB on each device")
    assert not (tmp_path / "run").exists()


def test_every_job_of_a_sweep_can_be_dry(forgets, capsys):
    forgets("-m", "forget_loss=grad_diff,rmu", "dry_run=true", "save_dir='run_${forget_loss.name}'")
    out = capsys.readouterr().out
    assert out.count("the memory of a step") == 2 and "MLP output projections of 1 block" in out


def test_an_evaluation_is_no_dry_run(forgets, capsys):
    with pytest.raises(SystemExit, match="2"):
        forgets("dry_run=true", "eval_only=true")
    assert "eval_only=true trains nothing" in capsys.readouterr().err


def test_bitsandbytes_is_tried_before_a_model_is_loaded(forgets, capsys):
    """Its paged AdEMAMix needs a GPU, its 8-bit AdamW runs on a CPU."""
    with pytest.raises(SystemExit, match="2"):
        forgets("optim=paged_ademamix_8bit", "dry_run=true")
    said = capsys.readouterr().err
    assert "optim=paged_ademamix_8bit: bitsandbytes cannot step on cpu" in said and "adamw_torch_fused" in said
    found = forgets("optim=adamw_bnb_8bit", "dry_run=true")
    assert found["states"] == int(300 * 32 * 8 + (39840 - 300 * 32) * 2 * (1 + 4 / 256))


def test_a_run_says_its_memory_first(run_script, model_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    common = ("model_family=tiny", f"data_path={MINI}", "split=forget10", f"model_path={model_folder}", "save_dir=run")
    run_script("forget.py", *common, "num_epochs=1", "gradient_accumulation_steps=1", "save_model=false")
    out = capsys.readouterr().out
    assert out.index("memory: about ") < out.index("finished: run") and "optim=adamw_torch_fused" in out


def test_what_cannot_be_counted_goes_on(monkeypatch, model_folder, caplog):
    """A config without a number that nothing stands in for: a warning, and the fused optimiser."""
    monkeypatch.setattr(sizes, "sizes_of", lambda model: model.config.no_such_number)
    cfg = checked("finetune", "model_family=tiny")
    with caplog.at_level(logging.WARNING):
        found = forecast.of_run(
            cfg, str(model_folder), Engine("ddp", False), None, [], objective.finetuning(), checkpointing=False
        )
    assert found == ("adamw_torch_fused", None) and "can't be estimated" in caplog.text
