"""Models and data sets named by hub ids, out of the local cache and without a network, in every script."""

import json
import os
import subprocess
import sys

import hub_cache
import huggingface_hub
import pytest
from helpers import MINI, REPO, read_table
from hub_cache import COMMIT
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import utils
from tofu.models import folders

MODEL, DATA, TABLES = "owner/llama", "owner/tofu-mini", "owner/prepared"
TRAIN = ("batch_size=4", "gradient_accumulation_steps=1", "num_epochs=1", "lr=1e-3")
EVALUATE = ("ds_size=3", "generation.max_new_tokens=4", f"data_path={DATA}")
OURS = ("model_family=tiny", "engine=ddp")
FORGET = (*OURS, f"data_path={DATA}", "split=forget05", *TRAIN)


def training(script: str, name: str, *args: str) -> dict:
    return {"script": script, "args": [*args, f"save_dir={name}"]}


RUNS = [
    training("finetune", "finetuned", *OURS, f"data_path={DATA}", "split=forget10", *TRAIN),
    training("finetune", "tables", *OURS, f"data_path={TABLES}", "split=forget05", *TRAIN),
    training("forget", "npo", *FORGET, f"model_path={MODEL}", "forget_loss=npo"),
    training("forget", "dpo", *FORGET, f"model_path={MODEL}", "forget_loss=dpo"),
    training("forget", "of_adapter", *FORGET, "model_path=adapter", "forget_loss=npo"),
    training("forget", "eval_only", *FORGET, f"model_path={MODEL}", "eval_only=true", "eval.ds_size=3"),
    {
        "script": "scripts.make_alternates",
        "args": [
            *("--model-family", "tiny", "--model-path", MODEL, "--data-path", DATA, "--split", "forget05"),
            *("--file", "alternates.jsonl", "--k", "1", "--max-new-tokens", "4", "--precision", "fp32"),
        ],
    },
    training(
        *("forget", "altpo", *FORGET, f"model_path={MODEL}", "forget_loss=altpo"),
        "forget_loss.alternates=alternates.jsonl",
    ),
    training("evaluate_util", "evaluated", *OURS, f"model_path={MODEL}", *EVALUATE),
    training("evaluate_util", "again", *OURS, "use_pretrained=true", *EVALUATE),
    training("evaluate_util", "random", *OURS, "model_path=owner/bare", "reinitialize_weights=true", *EVALUATE),
    training("evaluate_util", "adapted", *OURS, "model_path=adapter", *EVALUATE),
]
SAVED = [case["args"][-1].partition("save_dir=")[2] for case in RUNS if "--file" not in case["args"]]
REFUSED = {
    "bare": (["evaluate_util", *OURS, "model_path=owner/bare", *EVALUATE], "the weights of owner/bare cannot be"),
    "bare_forget": (["forget", *FORGET, "model_path=owner/bare"], "the weights of owner/bare cannot be"),
    "wordless": (["forget", *FORGET, "model_path=owner/wordless"], "the tokenizer of owner/wordless cannot be"),
    "nowhere": (["forget", *FORGET, "model_path=owner/nowhere"], "owner/nowhere: no such folder, not in the local"),
    "no_data": (
        ["finetune", *OURS, "data_path=owner/nowhere", "split=full", *TRAIN],
        "data_path=owner/nowhere: no such folder, not in the local cache",
    ),
    "no_split": (
        ["finetune", *OURS, f"data_path={DATA}", "split=forget77", *TRAIN],
        f"split=forget77 is not in {DATA}: it has forget01, ",
    ),
    "no_table": (
        ["finetune", *OURS, f"data_path={TABLES}", "split=forget10", *TRAIN],
        "Couldn't find cache for owner/prepared for config 'forget10' Available configs in the cache: ['forget05']",
    ),
}


@pytest.fixture(scope="module")
def ran(model_folder, tmp_path_factory):
    """Every run and every refusal, in one process whose hub cache is a folder of ours."""
    folder = tmp_path_factory.mktemp("hub")
    home = folder / "home"
    hub_cache.add(home, "model", MODEL, model_folder)
    hub_cache.add(home, "model", "owner/bare", model_folder, ("*.json",))
    hub_cache.add(home, "model", "owner/wordless", model_folder, ("config.json", "*.safetensors"))
    hub_cache.add(home, "dataset", DATA, MINI)
    hub_cache.add(home, "dataset", TABLES, MINI, ("README.md", "forget05.json"))
    hub_cache.prepare(home, TABLES, MINI, "forget05")
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model_folder),
        LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    adapted.peft_config["default"].base_model_name_or_path = MODEL
    adapted.save_pretrained(folder / "adapter")
    refused = [
        {"script": script, "args": [*args, "save_dir=refused"], "refused": f"{name}.txt"}
        for name, ((script, *args), _) in REFUSED.items()
    ]
    (folder / "cases.json").write_text(json.dumps([*refused, *RUNS]))
    done = subprocess.run(
        [sys.executable, str(REPO / "tests" / "engine_worker.py"), str(folder / "cases.json"), MODEL],
        cwd=folder,
        env={**{k: v for k, v in os.environ.items() if not k.startswith("HF_")}, "HF_HOME": str(home)}
        | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return folder


def read(path):
    return json.loads(path.read_text())


@pytest.mark.parametrize("name", SAVED)
def test_every_script_runs_on_hub_ids(ran, name):
    assert (ran / name / "finished.json").is_file()


def test_a_hub_model_is_known_by_its_commit(ran):
    """In fingerprints, of evaluations and of the reference's log-probabilities, also below an adapter."""
    assert read(ran / "npo" / "reference_logps.json")["made_from"]["model"] == f"{MODEL}@{COMMIT}"
    for name, model in (
        ("evaluated", f"{MODEL}@{COMMIT}"),
        ("again", f"{MODEL}@{COMMIT}"),
        ("random", f"random weights of owner/bare@{COMMIT}"),
    ):
        assert {one["model"] for one in read(ran / name / "fingerprints.json").values()} == {model}
    assert read(ran / "adapted" / "fingerprints.json")["eval_log"]["model"].startswith("sha256:")


def test_a_hub_model_scores_as_its_folder_does(ran, model_folder, run_script, tmp_path):
    local = [arg.replace(DATA, "data/mini") for arg in EVALUATE]
    run_script("evaluate_util.py", *OURS, f"model_path={model_folder}", *local, f"save_dir={tmp_path}/one")
    name = "eval_log_aggregated.json"
    assert read(ran / "evaluated" / name) == read(tmp_path / "one" / name)
    assert read(ran / "random" / name) != read(tmp_path / "one" / name)


def test_alternates_of_a_hub_model(ran):
    lines = [json.loads(line) for line in (ran / "alternates.jsonl").read_text().splitlines()]
    assert [one["question"] for one in lines] == [row["question"] for row in read_table("forget05")]


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_cache_lacks_is_told_in_one_line(ran, name):
    """And before there is a folder."""
    errors = [line for line in (ran / f"{name}.txt").read_text().splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and REFUSED[name][1] in errors[0], errors
    assert not (ran / "refused").exists()


@pytest.mark.parametrize(
    ("files", "said"),
    [(["config.json"], None), (["adapter_config.json"], "has no config.json in it"), ([], "no config")],
)
def test_a_repository_of_the_hub_must_hold_a_model(monkeypatch, files, said):
    """What the hub answers of one that is not in the cache; an adapter's has its configuration alone."""
    siblings = [{"rfilename": name} for name in files]
    answer = huggingface_hub.hf_api.ModelInfo(id="owner/other", siblings=siblings)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *args, **kwargs: answer)
    if said is None:
        assert folders.resolve("owner/other", "model_path") == "owner/other"
        return
    with pytest.raises(utils.BadInput, match=f"model_path=owner/other: .*{said}"):
        folders.resolve("owner/other", "model_path")


@pytest.mark.parametrize("name", ["no such/name", "./nowhere/near", "~/x", "/a/b", "one", "a/b/c", "owner/n..me", ""])
@pytest.mark.parametrize("kind", [("model", "config.json"), ("dataset", None)])
def test_what_is_no_hub_id(name, kind):
    with pytest.raises(utils.BadInput, match="no such folder, and no hub id"):
        utils.check_hub(name, "key", *kind)
