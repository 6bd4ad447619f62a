"""The real command lines, as a user types them: from another folder, alone and under torchrun, right and wrong."""

import csv
import json
import math
import shutil

import pytest
from helpers import SHARED, error_of, needs_shared
from transformers import AutoModelForCausalLM

SMALL = ("model_family=tiny", "data_path=data/mini", "engine=ddp")


@pytest.fixture(scope="module")
def finetuned(launch, model_folder, tmp_path_factory):
    """A run of forget.py from another folder: it leaves what the README says, and nothing elsewhere."""
    folder = tmp_path_factory.mktemp("elsewhere")
    launch(
        "forget.py",
        *(*SMALL, f"model_path={model_folder}", "split=forget05", "forget_loss=grad_diff", "lr=1e-3", "num_epochs=2"),
        *("batch_size=4", "gradient_accumulation_steps=1", "eval_while_train=true", "eval.ds_size=3", "save_dir=run"),
        cwd=folder,
    )
    return folder


def test_a_run_leaves_its_files_and_nothing_else(finetuned):
    assert [path.name for path in finetuned.iterdir()] == ["run"]
    run = finetuned / "run"
    names = {path.name for path in run.iterdir()}
    assert names >= {"config.yaml", "versions.json", "finished.json", "trainer_state.json", "model.safetensors"}
    assert names - {"checkpoint-5", "checkpoint-10"} == {name for name in names if (run / name).is_file()}
    assert AutoModelForCausalLM.from_pretrained(run).config.model_type == "llama"
    assert json.loads((run / "finished.json").read_text())["Model Utility"] >= 0
    history = json.loads((run / "trainer_state.json").read_text())["log_history"][0]
    assert history["loss"] == pytest.approx(history["forget_loss"] + history["retain_loss"], abs=1e-6)


def test_a_run_is_not_replaced_unless_told(finetuned, launch, run_script, model_folder, monkeypatch, capsys):
    args = (*SMALL, f"model_path={model_folder}", "split=forget05", "batch_size=4", "gradient_accumulation_steps=1")
    monkeypatch.chdir(finetuned)
    for save_dir, told in (
        ("run", "save_dir=run exists: name another, or overwrite_dir=true"),
        (model_folder.parent, "reads"),
    ):
        with pytest.raises(SystemExit, match="2"):
            run_script("forget.py", *args, f"save_dir={save_dir}")
        assert told in capsys.readouterr().err
    launch("forget.py", *args, "save_dir=run", "overwrite_dir=true", "num_epochs=1", cwd=finetuned)
    assert not (finetuned / "run" / "checkpoint-5").exists()


def test_evaluate_and_aggregate_with_two_processes(finetuned, launch, run_script, model_folder, monkeypatch):
    """The four logs are the same on one process and on two; the CSV has the leaderboard's columns."""
    args = ("model_family=tiny", "data_path=data/mini", f"model_path={model_folder}", "ds_size=5", "split=forget10")
    monkeypatch.chdir(finetuned)
    run_script("evaluate_util.py", *args, "save_dir=one")
    launch("evaluate_util.py", *args, "save_dir=two", processes=2, cwd=finetuned)
    name = "eval_log_aggregated.json"
    one, two = (json.loads((finetuned / folder / name).read_text()) for folder in ("one", "two"))
    for task, log in one.items():
        assert two[task]["avg_gt_loss"] == pytest.approx(log["avg_gt_loss"], abs=1e-6)
        assert two[task]["generated_text"] == log["generated_text"]
    run_script(
        "aggregate_eval_stat.py",
        *(
            f"retain_result=one/{name}",
            f"ckpt_result=two/{name}",
            "method_name=m",
            "submitted_by=me",
            "save_file=out.csv",
        ),
    )
    row = next(csv.DictReader((finetuned / "out.csv").open()))
    assert float(row["Forget Quality"]) > 0.99 and row["Method"] == "m" and len(row) == 16


@pytest.mark.slow
def test_torchrun_sweep_under_zero3(launch, model_folder, tmp_path):
    """-m, two jobs on two ranks."""
    done = launch(
        "forget.py",
        *(
            "-m",
            *SMALL[:2],
            "engine=deepspeed",
            f"model_path={model_folder}",
            "split=forget05",
            "forget_loss=grad_ascent,idk",
        ),
        *("batch_size=4", "gradient_accumulation_steps=1", "num_epochs=1", "save_dir='out/${forget_loss.name}'"),
        processes=2,
        cwd=tmp_path,
    )
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"grad_ascent", "idk"}, done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    for path in (tmp_path / "out").iterdir():
        assert (path / "finished.json").is_file()
        AutoModelForCausalLM.from_pretrained(path)


def test_help_explains_every_key(launch, tmp_path):
    text = launch("forget.py", "--help", cwd=tmp_path).stdout
    for key in ("forget_loss=grad_ascent", "LoRA.r=0", "eval.generation.max_length=200", "save_dir=", "engine=auto"):
        line = next(line for line in text.splitlines() if line.strip().startswith(key))
        assert len(line.split("  ")[-1]) > 10, line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("script", "args", "said"),
    [
        ("forget.py", ["lrr=1"], ["lrr is no key of forget.yaml", "did you mean lr"]),
        ("forget.py", ["forget_loss=npoo"], ["npoo", "grad_ascent"]),
        ("forget.py", ["model_family=tiny", "batch_size=many"], ["batch_size=many", "a whole number"]),
        ("finetune.py", ["--config-name=finetune.yaml", "model_family=phy"], ["model_family=phy", "did you mean phi?"]),
        ("finetune.py", ["model_family=tiny", "data_path=data/mini", "split=retain42"], ["split=retain42", "retain90"]),
        ("finetune.py", [*SMALL, "data_path=nowhere"], ["data_path=nowhere", "no such folder"]),
        ("finetune.py", ["model_family=llama2-7b", "data_path=data/mini"], ["NousResearch/Llama-2-7b-chat-hf", "hub"]),
        ("aggregate_eval_stat.py", ["retain_result=x"], ["ckpt_result, method_name"]),
    ],
    ids=lambda value: value if isinstance(value, str) else value[-1].split("=")[0],
)
def test_bad_input_is_told_in_one_line(capsys, run_script, monkeypatch, tmp_path, script, args, said):
    """Within this process; the test of all ranks starts real ones."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        run_script(script, *args)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and all(word in errors[0] for word in said), errors
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["split=forget01", "num_epochs=2"], "take batch_size=3 gradient_accumulation_steps=1"),
        (["split=forget01", "num_epochs=1"], "take batch_size=1 gradient_accumulation_steps=1"),
        (["split=forget10", "optim=adamwow"], "optim=adamwow is unknown"),
        (["split=forget10", "optim=lomo"], "optim=lomo: You need to install `lomo_optim`"),
        (["split=forget10", "report_to=foo"], "report_to=foo: foo is not supported, only "),
        (["split=forget10", "report_to=swanlab"], "report_to=swanlab: SwanLabCallback requires"),
        (["split=forget10", "report_to=[swanlab,foo]"], "report_to=['swanlab', 'foo']: "),
        (["split=forget10", "max_length=12"], "max_length=12 leaves no token of an answer"),
        (["split=forget10", "retain_split=retain01", "forget_loss=grad_diff"], "split=retain01 is not in"),
        (
            ["split=forget10", "eval_only=true", "eval.retain_result=nowhere.json"],
            "retain_result=nowhere.json: no such file",
        ),
        (
            ["split=forget10", "lr=1e30", "batch_size=4", "gradient_accumulation_steps=1"],
            "the forget term is no longer finite",
        ),
        (
            ["split=forget05", "lr=1e8", "num_epochs=3", "batch_size=20", "gradient_accumulation_steps=1"],
            "step 3, the last: its update is no longer finite",
        ),
    ],
    ids=lambda value: value.split(" ")[0] if isinstance(value, str) else "",
)
def test_what_a_run_refuses(capsys, model_folder, tmp_path, run_script, monkeypatch, args, said):
    """The same, within this process: what needs data, a tokenizer or a model to be found."""

    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        run_script("forget.py", *SMALL, f"model_path={model_folder}", "save_dir=run", *args)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and said in errors[0], errors
    assert not list(tmp_path.rglob("*.safetensors")) and not (tmp_path / "run" / "finished.json").exists()
    if "finite" not in said:
        assert not (tmp_path / "run").exists()
    else:  # the losses before the stop can be read
        assert json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"][0]["loss"] < 0


@pytest.mark.parametrize("lora", [0, 4])
@pytest.mark.parametrize(("loss", "term", "start"), [("dpo", "loss", 2 / 0.1 * math.log(2)), ("KL", "retain_loss", 0)])
def test_in_bf16_a_model_starts_equal_to_its_reference(model_folder, tmp_path, run_script, loss, term, start, lora):
    """The first step's learning rate is 0: dpo is 2 / beta ln 2, and KL nothing."""

    args = (*SMALL, f"model_path={model_folder}", "split=forget05", f"forget_loss={loss}", "precision=bf16", "lr=1e-3")
    cut = ("batch_size=10", "gradient_accumulation_steps=1", "num_epochs=2", "save_model=false", f"LoRA.r={lora}")
    run_script("forget.py", *args, *cut, "LoRA.dropout=0", f"save_dir={tmp_path}/run")
    first, last = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"][:4:3]
    assert first[term] == pytest.approx(start, abs=1e-6 if loss == "KL" else 1e-2)
    assert abs(last[term] - start) > 1e-4, "and then it moves away"


@pytest.mark.parametrize(
    ("base", "args", "said"),
    [
        (None, ["engine=deepspeed"], "holds only an adapter, which no engine that shards can load: take engine=ddp"),
        (None, ["engine=deepspeed", "eval_only=true"], "holds only an adapter"),
        ("nowhere", ["engine=ddp"], "adapter_config.json: base_model_name_or_path=nowhere: no such folder"),
    ],
)
def test_an_adapter_that_cannot_be_loaded(capsys, model_folder, tmp_path, run_script, monkeypatch, base, args, said):
    for variable in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(variable, "")  # what DeepSpeed is told without a launcher goes when the test does
        monkeypatch.delenv(variable)
    adapter = shutil.copytree(
        model_folder, tmp_path / "adapter", ignore=shutil.ignore_patterns("config.json", "*.safetensors")
    )
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base or str(model_folder)}))
    with pytest.raises(SystemExit, match="2"):
        run_script("forget.py", *SMALL[:2], f"model_path={adapter}", f"save_dir={tmp_path}/run", *args)
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_some_of_the_four_sets(model_folder, tmp_path, run_script, monkeypatch):
    """The forget set alone: its scores and forget quality, no utility; a log of other rows is refused beforehand."""

    monkeypatch.chdir(tmp_path)
    only = ("eval_task=[eval_log_forget]", "split_list=[forget05]", "base_answer_key=paraphrased_answer")
    base = ["evaluate_util.py", *SMALL, f"model_path={model_folder}", "generation.max_new_tokens=4", *only]
    run_script(*base, "save_dir=one")
    log = "retain_result=one/eval_log_aggregated.json"
    run_script(*base, "save_dir=two", log)
    scores = json.loads((tmp_path / "two" / "finished.json").read_text())
    assert scores["Forget Quality"] == 1 and "Model Utility" not in scores
    other = [arg.replace("forget05", "forget10") for arg in base]
    with pytest.raises(SystemExit, match="2"):
        run_script(*other, "ds_size=20", "save_dir=three", log)
    assert not (tmp_path / "three").exists()


def test_bad_input_is_told_once_by_all_ranks(launch, tmp_path, model_folder):
    """Found by Hydra, and by the data (four rows, in two processes of eight); check() alone: cli/test_checks.py."""
    for args, said in (
        (["lrr=1"], "lrr is no key"),
        ([*SMALL, f"model_path={model_folder}", "split=forget01", "num_epochs=1"], "learning rate above 0"),
    ):
        done = launch("forget.py", *args, processes=2, cwd=tmp_path, check=False, timeout=60)
        assert said in error_of(done)
    assert list(tmp_path.iterdir()) == []


@needs_shared
def test_aggregate_on_published_logs(launch, tmp_path):
    logs = SHARED / "golden" / "real_logs"
    pair = (f"retain_result={logs / 'llama2-7b_retain90.json'}", f"ckpt_result={logs / 'llama2-7b_full.json'}")
    rest = ("method_name=full", "submitted_by=me", "save_file=out.csv")
    launch("aggregate_eval_stat.py", *pair, *rest, cwd=tmp_path)
    row = next(csv.DictReader((tmp_path / "out.csv").open()))
    expected = json.loads((logs / "expected.json").read_text())["llama2-7b_full vs llama2-7b_retain90"]
    assert float(row["Forget Quality"]) == pytest.approx(expected["Forget Quality"], rel=1e-9)
    for name, value in expected["geometric"].items():
        assert float(row[name]) == pytest.approx(value, abs=1e-9)
    other = (f"retain_result={logs / 'llama2-7b_retain99.json'}", pair[1])
    assert "different rows" in error_of(launch("aggregate_eval_stat.py", *other, *rest, cwd=tmp_path, check=False))
