"""The same numbers on every engine: one launch an engine, which runs all cases, is compared with one process."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import METHODS, MINI, REPO, read_table, write_table
from transformers import AutoModelForCausalLM

# what differs by engine: references live, frozen layers, a change before saving; a kept reference is below; all methods
# are in test_every_method_equals_one_process
LOSSES = ("KL", "rmu", "task_vector")
# engine -> how a global batch of 16 is cut: (samples per process, accumulation)
ENGINES = {"ddp": (2, 4), "zero2": (8, 1), "zero3": (4, 2), "fsdp": (2, 4)}
KEYS = {  # what is said on the command line; ds.json is ZeRO-3 that shards even a tiny model
    "zero2": ("engine=deepspeed", "ds_config=config/ds_config_zero2.json"),
    "zero3": ("engine=deepspeed", "ds_config={folder}/ds.json"),
}


OWN = {"pdu": ("forget_loss.dual_warmup_epochs=0", "forget_loss.retain_weight=1")}  # its variable moves at each step


ELSEWHERE = ("ft_forget41", "rmu_forget41", "task_vector_forget41", "lora_dpo_forget41")  # ZeRO-3 is slow on two cores
UNEVEN = ("split=forget41", "retain_split=retain90", "allow_overlap=true", "num_epochs=1")


def common_of(folder: Path, engine: str, cut: tuple[int, int], data: Path) -> list[str]:
    """What every command line of a launch says."""
    return [
        *("model_family=tiny", "seed=1", "lr=1e-3", f"data_path={data}"),
        *(key.format(folder=folder.parent) for key in KEYS.get(engine, (f"engine={engine}",))),
        *(f"batch_size={cut[0]}", f"gradient_accumulation_steps={cut[1]}"),
    ]


def shapes(folder: Path, engine: str, cut: tuple[int, int], data: Path, model: Path) -> list[dict]:
    """The same steps without packing, and with logits in pieces (300 words a token)."""
    args = [*common_of(folder, engine, cut, data), f"model_path={model}", *UNEVEN, "forget_loss=KL"]
    return [
        {"script": "forget", "args": [*args, "packing=false", f"save_dir={folder / 'padded'}"], "name": "padded"},
        {"script": "forget", "args": [*args, f"save_dir={folder / 'pieces'}"], "name": "pieces", "logits": 20_000},
    ]


def cases(folder: Path, engine: str, cut: tuple[int, int], data: Path, model: Path) -> list[dict]:
    """Command lines: finetune and each loss with 41 rows, one of them with 40 too, adapters, evaluation at each epoch.

    The 41 rows are for the uneven last step, and one epoch has it.
    """
    common = common_of(folder, engine, cut, data)
    forget, rows = [*common, f"model_path={model}"], UNEVEN
    small = ["eval.ds_size=5", "eval.generation.max_length=64", "eval.generation.max_new_tokens=3"]
    found = []
    found.append({"script": "finetune", "args": [*common, "split=forget41", "num_epochs=1"], "name": "ft_forget41"})
    for loss in LOSSES:
        args = [*forget, *rows, f"forget_loss={loss}", *OWN.get(loss, ())]
        found.append({"script": "forget", "args": args, "name": f"{loss}_forget41"})
    args = [*forget, "split=forget10", "num_epochs=2", "forget_loss=grad_diff"]
    found.append({"script": "forget", "args": args, "name": "grad_diff_forget10"})
    lora = ["LoRA.r=4", "LoRA.dropout=0"]
    args = [*forget, *lora, *rows, "forget_loss=dpo"]
    found.append({"script": "forget", "args": args, "name": "lora_dpo_forget41"})
    watched = [*forget, "split=forget10", "num_epochs=2", "eval_while_train=true", *small, "eval.split=forget10"]
    found.append({"script": "forget", "args": [*watched, "forget_loss=grad_diff"], "name": "watched"})
    found.append({"script": "forget", "args": [*watched, *lora, "forget_loss=KL"], "name": "lora"})
    engine_keys = [arg for arg in common if arg.startswith(("engine", "ds_config"))]
    alone = ["model_family=tiny", f"model_path={model}", f"data_path={data}", *engine_keys, "ds_size=7", "batch_size=3"]
    alone += ["generation.max_length=80", "generation.max_new_tokens=6", "split=forget10"]
    found.append({"script": "evaluate_util", "args": alone, "name": "evaluated"})
    if engine.startswith("zero"):
        args = [*forget, *rows, "forget_loss=npo", "precision=bf16"]
        found.append({"script": "forget", "args": args, "name": "bf16", "alone": True})
    found = [case for case in found if engine != "zero3" or case["name"] not in ELSEWHERE]
    for case in found:
        case["args"].append(f"save_dir={folder / case['name']}")
    return found


@pytest.fixture(scope="module")
def setting(model_folder, tmp_path_factory):
    """Data with a split of 41 rows, a family entry's model, and a DeepSpeed config that shards even a tiny model."""
    folder = tmp_path_factory.mktemp("engines")
    names = ("forget10", "retain90", "forget10_perturbed", "retain_perturbed")
    tables = {name: read_table(name) for name in (*names, "real_authors_perturbed", "world_facts_perturbed")}
    data = write_table(folder / "data", **tables, forget41=read_table("retain90")[:41])
    config = json.loads((REPO / "config" / "ds_config.json").read_text())
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (folder / "ds.json").write_text(json.dumps(config))
    return folder, data, model_folder


def launch(setting, engine: str, processes: int, cut: tuple[int, int], cases=cases) -> Path:
    folder, data, model = setting
    out = folder / f"{cases.__name__}_{engine}_{processes}"
    out.mkdir()
    listed = cases(out, engine, cut, data, model)
    (out / "cases.json").write_text(json.dumps(listed))
    worker = [str(REPO / "tests" / "engine_worker.py"), str(out / "cases.json"), str(model)]
    start = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"] if processes > 1 else []
    done = subprocess.run([sys.executable, *start, *worker], cwd=out, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return out


@pytest.fixture(scope="module")
def one(setting):
    return launch(setting, "ddp", 1, (16, 1))


@pytest.fixture(scope="module", params=[pytest.param("zero2", marks=pytest.mark.slow), "ddp", "zero3", "fsdp"])
def two(request, setting):
    return request.param, launch(setting, request.param, 2, ENGINES[request.param])


@pytest.fixture(
    scope="module", params=["ddp", *(pytest.param(name, marks=pytest.mark.slow) for name in ENGINES if name != "ddp")]
)
def shaped(request, setting):
    return launch(setting, request.param, 2, ENGINES[request.param], shapes)


def methods(folder: Path, engine: str, cut: tuple[int, int], data: Path, model: Path) -> list[dict]:
    """Finetuning, and every method, full and with adapters, with 41 rows."""
    rows = read_table("retain90")[:41]
    alternates = folder.parent / "alternates.jsonl"
    lines = [{**row, "alternate": rows[i - 1]["answer"]} for i, row in enumerate(rows)]
    alternates.write_text("".join(json.dumps(line) + "\n" for line in lines))
    told = common_of(folder, engine, cut, data)
    common = [*told, f"model_path={model}", *UNEVEN]
    args = [*told, "split=forget41", "num_epochs=1", f"save_dir={folder / 'ft_forget41'}"]
    found = [{"script": "finetune", "args": args, "name": "ft_forget41"}]
    for method in METHODS:
        own = [f"forget_loss.alternates={alternates}"] if method == "altpo" else OWN.get(method, ())
        for kind, lora in (("", ()), ("lora_", ("LoRA.r=4", "LoRA.dropout=0"))):
            name = f"{kind}{method}_forget41"
            args = [*common, f"forget_loss={method}", *own, *lora, f"save_dir={folder / name}"]
            found.append({"script": "forget", "args": args, "name": name})
    return found


@pytest.fixture(scope="module")
def methods_on_one(setting):
    return launch(setting, "ddp", 1, (16, 1), methods)


@pytest.mark.slow
@pytest.mark.parametrize("engine", list(ENGINES))
def test_every_method_equals_one_process(setting, methods_on_one, engine):
    """The whole matrix of methods, full and LoRA, and engines: every step's loss, and the saved weights."""
    assert_equal(engine, methods_on_one, launch(setting, engine, 2, ENGINES[engine], methods))


def losses_of(run: Path) -> list[float]:
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    return [line["loss"] for line in history if "loss" in line]


def runs(folder: Path) -> list[str]:
    cases = json.loads((folder / "cases.json").read_text())
    return [case["name"] for case in cases if case["script"] != "evaluate_util" and "alone" not in case]


def test_engine_equals_one_process(one, two):
    """Same loss at every step, the same logs, the same saved weights; really sharded; loads from disk."""
    engine, folder = two
    assert_equal(engine, one, folder)


def assert_equal(engine: str, one: Path, folder: Path) -> None:
    """All runs of two launches: losses to 1e-4, saved weights."""
    for name in runs(folder):
        expected, got = losses_of(one / name), losses_of(folder / name)
        assert len(expected) == len(got) == (3 if name.endswith("forget41") else 6)
        assert got == pytest.approx(expected, abs=1e-4), f"{engine} {name}"
        models = [AutoModelForCausalLM.from_pretrained(path / name) for path in (one, folder)]
        for (key, a), (_, b) in zip(*(m.state_dict().items() for m in models), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=2e-3, msg=lambda m, k=key, n=name: f"{engine} {n} {k}: {m}")


@pytest.mark.parametrize("shape", ["padded", "pieces"])
def test_other_shapes_are_the_same_steps(one, shaped, shape):
    """Without packing a step's samples are dealt by length, in other micro-batches."""
    assert losses_of(shaped / shape) == pytest.approx(losses_of(one / "KL_forget41"), abs=1e-4)


def test_evaluation_equals_one_process(one, two):
    """Seven rows a set, in batches of three: odd numbers on two ranks, sharded or not; losses to 1e-5."""
    engine, folder = two
    expected, got = (
        json.loads((path / "evaluated" / "eval_log_aggregated.json").read_text()) for path in (one, folder)
    )
    for task, log in expected.items():
        for metric, values in log.items():
            for i, value in values.items():
                found = got[task][metric][i]
                assert found == (value if metric == "generated_text" else pytest.approx(value, rel=1e-5, abs=1e-5))


def test_parameters_are_really_sharded(two):
    engine, folder = two
    for rank in (0, 1):
        seen = json.loads((folder / f"grad_diff_forget10.rank{rank}.json").read_text())
        if engine == "fsdp":
            assert seen["dtensors"] > 0 and seen["held"] < 0.6 * seen["whole"]
        elif engine == "zero3":
            assert seen["held"] == 0 and seen["engine"] == "DeepSpeedEngine"
        elif engine == "zero2":
            assert seen["held"] == seen["whole"] and seen["engine"] == "DeepSpeedEngine"
        else:
            assert seen["held"] == seen["whole"] and seen["engine"] == "DistributedDataParallel"
            assert seen["views"] is True  # else it holds the gradients twice


def test_deepspeed_sums_gradients_in_float32(two):
    """As the other engines do: over processes and over micro-batches, of a model that computes in bf16.

    Nor does it round the reference log-probabilities: npo's first loss is 2 log 2 / beta (it was 14.2).
    """
    engine, folder = two
    if engine.startswith("zero"):
        assert losses_of(folder / "bf16")[0] == pytest.approx(20 * math.log(2), abs=0.03)
        seen = json.loads((folder / "bf16.rank0.json").read_text())
        assert seen["types"] == ["torch.bfloat16", *["torch.float32"] * 3]


def test_evaluation_from_disk_equals_the_one_in_memory(two, one):
    """At the last epoch's end, sharded or with adapters, and from the saved model in another process: 1e-5."""
    engine, folder = two
    from helpers import evaluate

    for name in ("watched", "lora"):
        memory = json.loads((folder / name / "checkpoint-6" / "eval_log_aggregated.json").read_text())
        disk = evaluate(folder / name, MINI, folder / name / "again", ds_size=5, max_length=64, max_new_tokens=3)
        for task, log in memory.items():
            for metric in ("avg_gt_loss", "avg_paraphrased_loss"):
                assert disk[task][metric] == pytest.approx(log[metric], abs=1e-5), f"{engine} {name} {task}"
            assert disk[task]["rougeL_recall"] == pytest.approx(log["rougeL_recall"]), f"{engine} {name} {task}"


def test_training_moves_the_weights(one, model_folder):
    start = AutoModelForCausalLM.from_pretrained(model_folder).state_dict()
    for name in runs(one):
        end = AutoModelForCausalLM.from_pretrained(one / name).state_dict()
        assert max((end[key] - start[key]).abs().max().item() for key in start) > 1e-4, name


CUT = ("ft_forget41", "KL_forget41", "grad_diff_forget10")


@pytest.mark.slow
def test_gradient_accumulation_is_only_another_cut(setting, one):
    """16 x 1 and 4 x 4 on one process: finetune, a live reference, and both 40 and 41 rows."""
    folder, data, model = setting
    out = folder / "accumulated"
    out.mkdir()
    listed = [c for c in cases(out, "ddp", (4, 4), data, model) if c["name"] in CUT]
    (out / "cases.json").write_text(json.dumps(listed))
    worker = [str(REPO / "tests" / "engine_worker.py"), str(out / "cases.json"), str(model)]
    subprocess.run([sys.executable, *worker], cwd=out, check=True, capture_output=True, timeout=500)
    for case in listed:
        assert losses_of(out / case["name"]) == pytest.approx(losses_of(one / case["name"]), abs=1e-4), case["name"]
