"""What a model's folder must hold: weights that leave a tensor to chance are refused before a run has a folder."""

import copy
import json
import logging
import shutil

import pytest
import torch
from helpers import ARCHITECTURES, SHARED, make, needs_shared
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import utils
from tofu.models import engines, families, folders, loadable, loading

DDP = engines.Engine("ddp", False)
FORMATS = ("safetensors", "sharded", "bin")
EMBEDDING = "model.embed_tokens.weight"


def prefixed(prefix):
    return lambda weights: {f"{prefix}{name}": tensor for name, tensor in weights.items()}


def without(part):
    return lambda weights: {name: tensor for name, tensor in weights.items() if part not in name}


def with_another_shape(weights):
    return weights | {"lm_head.weight": torch.zeros(7, 32)}


def with_a_third_layer(weights):
    extra = {name.replace("layers.1.", "layers.2."): tensor for name, tensor in weights.items() if "layers.1." in name}
    return weights | {name: tensor.clone() for name, tensor in extra.items()}


FAULTS = {  # name -> (what happened to the weights, what the refusal says)
    "compiled": (prefixed("_orig_mod."), "lacks 21 tensors (lm_head.weight, model.embed_tokens.weight, model.layers.0"),
    "wrapped": (prefixed("module."), "the prefix module., DistributedDataParallel's, stands before the names"),
    "unknown": (prefixed("student."), "the prefix student. stands before the names"),
    "layer": (without("layers.1."), "lacks 9 tensors (model.layers.1."),
    "head": (without("lm_head"), "lacks 1 tensor (lm_head.weight): save the whole model again"),
    "shape": (with_another_shape, "than the model's: 1 tensor (lm_head.weight (7, 32) instead of (300, 32))"),
}


def write(folder, weights, kind="safetensors"):
    """Put `weights` into a folder as one of the formats that transformers reads."""
    if kind == "bin":
        torch.save(weights, folder / "pytorch_model.bin")
    elif kind == "safetensors":
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        names = sorted(weights)
        files = {name: f"model-0000{1 + (i % 2)}-of-00002.safetensors" for i, name in enumerate(names)}
        for file in set(files.values()):
            held = {name: weights[name] for name in names if files[name] == file}
            save_file(held, folder / file, metadata={"format": "pt"})
        index = {"metadata": {}, "weight_map": files}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture
def broken(model_folder, tmp_path):
    """`broken(change, kind)` is a copy of the random model whose weights `change` has been at."""

    def changed(change, kind="safetensors"):
        folder = shutil.copytree(model_folder, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
        write(folder, change(load_file(model_folder / "model.safetensors")), kind)
        return folder

    return changed


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("fault", FAULTS)
def test_weights_that_do_not_fill_the_model_are_refused(broken, fault, kind):
    """By the check beforehand and by loading itself, with one line."""
    change, said = FAULTS[fault]
    folder = broken(change, kind)
    for look in (loadable.check_loadable, loading.load_frozen):
        if look is loading.load_frozen and fault == "shape":
            continue  # transformers itself refuses to load it
        with pytest.raises(utils.BadInput) as refusal:
            look(str(folder), DDP)
        assert said in str(refusal.value) and str(folder) in str(refusal.value) and "\n" not in str(refusal.value)
    loadable.check_loadable(str(folder), DDP, weights=False)
    loading.load_frozen(str(folder), DDP, random_weights=True)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("fault", ["none", "compiled", "layer", "head", "more"])
def test_the_check_finds_what_loading_finds(broken, fault, kind):
    change = {"none": dict, "more": with_a_third_layer}.get(fault) or FAULTS[fault][0]
    folder = broken(change, kind)
    keys = ("missing_keys", "unexpected_keys", "mismatched_keys")
    _, loaded = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    shell, looked = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, device_map="meta")
    assert {key: looked[key] for key in keys} == {key: loaded[key] for key in keys}
    assert all(parameter.is_meta for parameter in shell.parameters())


@pytest.mark.parametrize("kind", FORMATS)
def test_whole_weights_are_not_refused(broken, kind, caplog):
    with caplog.at_level(logging.WARNING):
        loadable.check_loadable(str(broken(dict, kind)), DDP)
    assert not caplog.records


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_every_architecture_is_loaded_as_it_is_saved(name, tmp_path, caplog):
    """Tied embeddings, which are saved once, and names that transformers turns into others, are whole."""
    make(name).save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        loadable.check_loadable(str(tmp_path), DDP)
        loading.load(str(tmp_path))
    assert not caplog.records


def test_tied_embeddings_are_there_once(tmp_path):
    """And are missed where they are not there at all."""
    config = LlamaConfig(vocab_size=30, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    config.tie_word_embeddings = True
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in weights
    loadable.check_loadable(str(tmp_path), DDP)
    write(tmp_path, without("embed")(weights))
    with pytest.raises(utils.BadInput, match=EMBEDDING):
        loadable.check_loadable(str(tmp_path), DDP)


def test_tensors_without_a_place_are_named(broken, caplog):
    with caplog.at_level(logging.WARNING):
        loadable.check_loadable(str(broken(with_a_third_layer)), DDP)
    (said,) = [record.getMessage() for record in caplog.records]
    assert "no place for 9 tensors (model.layers.2." in said


@pytest.mark.parametrize("content", [None, b"", b"not weights at all"])
def test_weights_that_cannot_be_read(model_folder, tmp_path, content):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    if content is not None:
        (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(utils.BadInput, match=r"the weights of .*model cannot be loaded \(.*\): save or copy it again"):
        loadable.check_loadable(str(folder), DDP)


@pytest.mark.parametrize(
    ("script", "args"),
    [
        ("finetune", ["split=forget05"]),
        ("forget", ["split=forget05", "forget_loss=npo", "model_path={folder}"]),
        ("forget", ["split=forget05", "eval_only=true", "model_path={folder}"]),
        ("forget", ["split=forget05", "model_path={adapter}"]),
        ("evaluate_util", ["ds_size=2", "model_path={folder}"]),
        ("evaluate_util", ["ds_size=2", "use_pretrained=true"]),
        ("evaluate_util", ["ds_size=2", "model_path={adapter}"]),
    ],
)
def test_every_script_refuses_them_before_it_makes_a_folder(
    broken, script, args, capsys, tmp_path, run_script, monkeypatch, model_folder
):

    folder, adapter = broken(FAULTS["compiled"][0]), tmp_path / "adapter"
    adapted(model_folder, adapter)
    described = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(described | {"base_model_name_or_path": str(folder)}))
    known = copy.deepcopy(families.entries())
    known.tiny.hf_key = str(folder)
    monkeypatch.setattr(families, "entries", lambda: known)
    common = ["model_family=tiny", "data_path=data/mini", "engine=ddp", f"save_dir={tmp_path}/run"]
    with pytest.raises(SystemExit, match="2"):
        run_script(f"{script}.py", *common, *(arg.format(folder=folder, adapter=adapter) for arg in args))
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "the prefix _orig_mod., torch.compile's, stands before the names" in errors[0]
    assert not (tmp_path / "run").exists()


def test_random_weights_need_none(broken, tmp_path, run_script):

    folder = broken(FAULTS["layer"][0])
    args = ("model_family=tiny", "data_path=data/mini", "engine=ddp", f"model_path={folder}", "ds_size=2")
    only = ("eval_task=[eval_log_forget]", "split_list=[forget05]", "generation.max_new_tokens=2")
    rest = ("base_answer_key=paraphrased_answer", "reinitialize_weights=true", f"save_dir={tmp_path}/run")
    run_script("evaluate_util.py", *args, *only, *rest)
    assert (tmp_path / "run" / "finished.json").is_file()


def adapted(model_folder, folder):
    """An adapter with weights other than 0, in a folder."""
    torch.manual_seed(0)
    config = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(model_folder), config).save_pretrained(folder)


ADAPTER_FAULTS = {
    "compiled": (prefixed("_orig_mod."), "the prefix _orig_mod., torch.compile's, stands before the names"),
    "layer": (without("layers.1."), "the file lacks 14 tensors (base_model.model.model.layers.1."),
    "deeper": (with_a_third_layer, "the model has no place for 14 tensors (base_model.model.model.layers.2."),
    "shape": (
        lambda weights: {name: torch.cat([tensor, tensor], 1) for name, tensor in weights.items()},
        "size mismatch for base_model.model.model.layers.0.",
    ),
}


@pytest.mark.parametrize("fault", ADAPTER_FAULTS)
def test_an_adapter_that_does_not_fit_its_base_is_refused(model_folder, tmp_path, fault):
    change, said = ADAPTER_FAULTS[fault]
    adapted(model_folder, tmp_path)
    loadable.check_loadable(str(tmp_path), DDP)
    path = tmp_path / "adapter_model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in change(load_file(path)).items()}, path)
    with pytest.raises(utils.BadInput) as refusal:
        loadable.check_loadable(str(tmp_path), DDP)
    assert said in str(refusal.value) and str(tmp_path) in str(refusal.value)


def test_a_merged_adapter_can_be_trained(model_folder, tmp_path):
    """All of it, as any other model; its weights are the base's and the adapter's together."""
    adapted(model_folder, tmp_path)
    merged, base = loading.load(str(tmp_path)), loading.load(str(model_folder))
    assert all(parameter.requires_grad for parameter in merged.parameters())
    moved = {name for name, p in merged.named_parameters() if not torch.equal(p, base.get_parameter(name))}
    assert moved == {name for name, _ in base.named_parameters() if "_proj" in name}


@pytest.mark.parametrize(
    ("described", "said"), [({}, "does not say which model"), ({"base_model_name_or_path": None}, "does not say which")]
)
def test_an_adapter_without_the_name_of_its_base(tmp_path, described, said):
    (tmp_path / "adapter_config.json").write_text(json.dumps(described))
    with pytest.raises(utils.BadInput, match=said):
        folders.resolve(str(tmp_path), "model_path")


def test_what_stands_before_the_names():
    assert loadable.prefix_of(["a.b", "c"], ["x.a.b", "x.c", "y.c"]) == "x."
    assert loadable.prefix_of(["a.b"], ["base.model.a.b"]) == "base.model."
    assert loadable.prefix_of(["a.b"], ["a.c", "b"]) is None
    assert loadable.prefix_of([], ["x.a"]) is None


@needs_shared
@pytest.mark.parametrize("name", ["tiny-llama", "tiny-llama-ga", "tiny-llama-retain90"])
def test_the_golden_models_are_whole(name, caplog):
    path = SHARED / "golden" / "models" / name
    with caplog.at_level(logging.WARNING):
        loadable.check_loadable(str(path), DDP)
    assert not caplog.records
    plain = AutoModelForCausalLM.from_pretrained(path)
    assert all(torch.equal(p, plain.get_parameter(n)) for n, p in loading.load(str(path)).named_parameters())
