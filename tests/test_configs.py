"""Every YAML of config/ composes, passes the check and explains itself: a new one is tested by being there."""

import json
from pathlib import Path

import pytest
from helpers import ENTRIES, METHODS, NEEDED, checked
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from tofu.cli import command_line
from tofu.cli.schema import CONFIG_DIR
from tofu.models import families


def keys_of(cfg: DictConfig, prefix: str = "") -> set[str]:
    """The dotted names of a config's leaves; an empty group is a leaf."""
    found = set()
    for key, value in cfg.items():
        nested = isinstance(value, DictConfig) and len(value)
        found |= keys_of(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}"}
    return found


@pytest.mark.parametrize("name", ENTRIES)
def test_config_composes_and_checks(name):
    cfg = checked(name, *NEEDED.get(name, []))
    assert OmegaConf.is_readonly(cfg)
    assert not OmegaConf.missing_keys(cfg)


@pytest.mark.parametrize("name", ENTRIES)
def test_every_key_is_explained(name):
    """--help has a line for each key of the composed config, and no other."""
    cfg = checked(name, *NEEDED.get(name, []))
    explained = {key: comment for key, _, comment in command_line._explained(name)}
    assert set(explained) - {"forget_loss"} == keys_of(cfg)
    assert all(comment for comment in explained.values())


@pytest.mark.parametrize("method", METHODS)
def test_method_composes_checks_and_is_explained(method):
    cfg = checked("forget", f"forget_loss={method}", *NEEDED.get(method, []))
    assert cfg.forget_loss.name == method
    assert cfg.save_dir.rpartition("/")[2] == f"{method}_{cfg.lr}_forget01_{cfg.num_epochs}_seed42"
    explained = {key for key, _, _ in command_line._explained("forget", {"forget_loss": method})}
    for key in keys_of(cfg):
        assert key in explained or key.rpartition(".")[0] in explained, key


@pytest.mark.parametrize("name", list(families.entries()))
def test_family(name):
    found = families.family(name)
    assert found.question_start_tag and found.question_end_tag
    assert found.end_token is None or found.end_token in found.question_end_tag
    checked("finetune", f"model_family={name}")


def test_defaults_are_the_benchmarks():
    """The numbers that published runs were made with."""
    finetune, forget, evaluate = checked("finetune"), checked("forget"), checked("eval_everything", "model_path=o/m")
    assert (finetune.batch_size, finetune.gradient_accumulation_steps, finetune.max_grad_norm) == (16, 1, 0)
    assert (forget.batch_size, forget.gradient_accumulation_steps, forget.max_grad_norm) == (16, 4, 0)
    for cfg in (finetune, forget):
        assert (cfg.lr, cfg.num_epochs, cfg.weight_decay, cfg.max_length, cfg.seed) == (1e-5, 5, 0.01, 500, 42)
        assert (cfg.LoRA.r, cfg.LoRA.alpha, cfg.LoRA.dropout) == (0, 32, 0.05)
    assert (evaluate.ds_size, evaluate.batch_size, evaluate.generation.max_length) == (300, "auto", 200)
    assert evaluate.split_list[3] == evaluate.split == "forget10_perturbed"


@pytest.mark.parametrize("name", ["finetune", "forget"])
def test_lora_config_differs_in_three_keys(name):
    full, lora = checked(name), checked(f"{name}_lora")
    assert {key for key in keys_of(full) if OmegaConf.select(full, key) != OmegaConf.select(lora, key)} == {
        *("LoRA.r", "lr", "save_dir"),
        *({"eval.save_dir", "forget_loss.lr"} if name == "forget" else set()),
    }
    assert (lora.LoRA.r, lora.lr) == (8, 1e-4)


def test_lora_and_full_runs_of_one_setting_have_different_folders():
    for name in ("finetune", "forget"):
        assert checked(name, "lr=1e-4").save_dir != checked(f"{name}_lora").save_dir


def test_deepspeed_config_leaves_to_the_trainer_what_our_keys_say():
    config = json.loads((CONFIG_DIR / "ds_config.json").read_text())
    assert config["zero_optimization"]["stage"] == 3
    assert config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True
    assert config["gradient_clipping"] == "auto" and config["bf16"]["enabled"] == "auto"
    assert not {"optimizer", "scheduler", "fp16"} & set(config)


def test_the_benchmarks_have_learning_rates_of_methods_that_exist():
    """The embedded model of every method: README.md sends its users there."""
    tiny, tofu = (set(OmegaConf.load(CONFIG_DIR.parent / "benchmarks" / f"{on}_lrs.yaml")) for on in ("tiny", "tofu"))
    assert tiny <= set(METHODS) and {"grad_ascent", "npo", "simnpo"} < tofu <= tiny - {"altpo"}


PRESETS = {  # name -> method, lr, num_epochs, retain_weight, family
    "tofu_llama2": ("grad_diff", 1e-5, 5, 1, "llama2-7b"),
    "tofu_phi": ("grad_diff", 2e-5, 5, 1, "phi"),
    "tuned_altpo": ("altpo", 5e-5, 5, 1, "ou-llama3.2-1b"),
    "tuned_npo": ("npo_grad_diff", 2e-5, 10, 1, "ou-llama3.2-1b"),
    "tuned_simnpo": ("simnpo_grad_diff", 5e-5, 10, 1, "ou-llama3.2-1b"),
    "tuned_idkdpo": ("dpo_grad_diff", 5e-5, 10, 1, "ou-llama3.2-1b"),
    "tuned_grad_diff": ("grad_diff", 2e-5, 5, 5, "ou-llama3.2-1b"),
}


def test_every_preset_is_tested():
    assert set(PRESETS) == set(command_line._options(command_line.PRESETS))


@pytest.mark.parametrize("preset", PRESETS)
def test_preset(preset):
    """The published numbers, at both places where they are recorded; what else the command line says wins."""
    method, lr, num_epochs, retain_weight, family = PRESETS[preset]
    args = [f"+experiment={preset}", "model_path=o/m", *NEEDED.get(method, [])]
    cfg = checked("forget", *args)
    assert (cfg.forget_loss.name, cfg.model_family, cfg.split) == (method, family, "forget10")
    assert (cfg.lr, cfg.num_epochs, cfg.forget_loss.retain_weight) == (lr, num_epochs, retain_weight)
    assert (cfg.forget_loss.lr, cfg.forget_loss.num_epochs) == (lr, num_epochs)
    if preset == "tuned_simnpo":
        assert cfg.forget_loss.forget_args == {"beta": 3.5, "margin": 1} and cfg.forget_loss.forget_weight == 0.125
    if preset.startswith("tofu_"):
        assert 2 * cfg.batch_size * cfg.gradient_accumulation_steps == 32
    assert checked("forget", *args, "lr=3e-5", "split=forget05").lr == 3e-5
    adapters = checked("forget_lora", *args)
    assert (adapters.LoRA.r, adapters.lr, adapters.num_epochs) == (8, lr, num_epochs)


COMPOSED = Path(__file__).parent / "data" / "composed.yaml"  # what each command line came to at version 0.1.0


def flat(name: str, *overrides: str) -> dict[str, object]:
    """A composed config as dotted key -> value, interpolations resolved; ??? where a value has to be given.

    model_family was llama2-7b in every config; now forget.py and evaluate_util.py take the model's own.
    """
    if name.startswith(("forget", "eval")):
        overrides = ("model_family=llama2-7b", *overrides)
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        cfg = OmegaConf.to_container(compose(name, list(overrides)), resolve=True)
    found: dict[str, object] = {}

    def walk(values: dict, prefix: str) -> None:
        for key, value in values.items():
            if isinstance(value, dict) and value:
                walk(value, f"{prefix}{key}.")
            elif key != "class":  # of a method with state: how it is found
                found[prefix + key] = value

    walk(cfg, "")
    return found


@pytest.mark.parametrize("name", OmegaConf.load(COMPOSED))
def test_a_command_line_composes_what_it_always_did(name):
    """Each config in full, and each override by what it changes; keys that were added since are no difference."""
    known = OmegaConf.to_container(OmegaConf.load(COMPOSED))[name]
    base = flat(name)
    assert {key: base[key] for key in known["keys"]} == known["keys"]
    for override, changed in known["overrides"].items():
        found = flat(name, *override.split())
        differing = {key: value for key, value in found.items() if key not in base or base[key] != value}
        assert {key: differing.get(key) for key in changed} == changed, override
        assert set(differing) - set(changed) <= set(found) - set(known["keys"]), override
