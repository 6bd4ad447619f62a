"""The best epoch's weights are saved, a run stops where it is asked to, scores and losses reach the training log."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from helpers import MINI, REPO, make, rows
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, TrainerState
from transformers.integrations import integration_utils

import utils
from tofu.evaluation import best
from tofu.evaluation.best import Choice, Constraint
from tofu.evaluation.metrics import table
from tofu.methods import losses
from tofu.models import batches, forward, loading
from tofu.runtime import run_folder
from tofu.training import callbacks
from tofu.training.best import KeepBest
from tofu.training.disruption import Disruption

UTILITY = Constraint("Model Utility", ">=", 0.5)


def scores(quality, utility=1.0):
    return {"Forget Quality": quality, "Model Utility": utility}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Model Utility >= 0.95 * start", Constraint("Model Utility", ">=", 0.95, True)),
        ("Model Utility>=0.6", Constraint("Model Utility", ">=", 0.6)),
        (
            "Truth Ratio (prob_mean) Forget <= 1e-3*start",
            Constraint("Truth Ratio (prob_mean) Forget", "<=", 1e-3, True),
        ),
        ("PrivLeak >= -5", Constraint("PrivLeak", ">=", -5.0)),
        ("model_utility >= start", Constraint("model_utility", ">=", 1.0, True)),
    ],
)
def test_a_constraint_is_read(text, expected):
    assert best.parse(text) == expected


@pytest.mark.parametrize(
    "text", ["", "Model Utility", "Model Utility > 0.6", ">= 0.6", "Model Utility >= high", "0.6 <= Model Utility <= 1",
             "Model Utility >= 0.95 start", "Model Utility >= 95 % of start", "Model Utility = 0.6"]
)  # fmt: skip
def test_a_constraint_that_is_none_is_refused(text):
    with pytest.raises(utils.BadInput, match="it must be a metric, >= or <=, and a number"):
        best.parse(text)


def test_evaluations_are_ranked():
    """Among those that hold the constraint by the metric; a failing one is behind all of these, the nearest first."""
    choice = Choice("Forget Quality", "max", None, UTILITY)
    found = [scores(0.9, 0.1), scores(0.1, 0.4), scores(0.2, 0.5), scores(0.3, 0.7)]
    assert sorted(found[::-1], key=choice.rank) == found
    assert [choice.holds(one) for one in found] == [False, False, True, True]
    assert choice.told(found[1]) == "Forget Quality 0.1 (Model Utility 0.4, >= 0.5 fails)"
    assert Choice("Forget Quality", "min").rank(scores(0.1)) > Choice("Forget Quality", "min").rank(scores(0.2))
    near = Choice("Forget Quality", "min", 0.5)
    assert near.rank(scores(0.4)) > near.rank(scores(0.7))
    upper = Choice("Forget Quality", "max", None, Constraint("Model Utility", "<=", 0.5))
    assert upper.holds(scores(0, 0.5)) and upper.rank(scores(0, 0.75))[0] == -0.25
    assert choice.missing({"Forget Quality": 1.0, "Model Utility": math.nan}) == "Model Utility"


def test_names_of_metrics():
    known = table.chosen(["tofu", "memorisation"])
    for name in ("Forget Quality", "forget quality", "forget_quality"):
        assert best.named("key", name, known).name == "Forget Quality"
    assert best.named("key", "extraction_strength", known).name == "Extraction Strength Forget"
    assert best.named("key", "agg", table.chosen(["agg"], {"Agg"})).name == "Agg (ngrams)"
    for name, said in (
        ("agg", "key=agg is not evaluated: add agg to eval.metrics"),
        ("MIA loss", "key=MIA loss is not evaluated: add mia_loss to eval.metrics"),
        ("Forget Qality", r"key=Forget Qality is unknown \(did you mean Forget Quality\?\)"),
    ):
        with pytest.raises(utils.BadInput, match=said):
            best.named("key", name, known)


def test_numbers_of_the_starting_and_the_retain_model_are_put_in():
    keep = SimpleNamespace(metric="forget_quality", direction=None, constraint="model_utility >= 0.5 * start")
    known = table.chosen(["tofu", "privacy"])
    start = {"Model Utility": {"value": 0.8}}
    found = best.choice(keep, known, start, None, "how")
    assert found == Choice("Forget Quality", "max", None, Constraint("Model Utility", ">=", 0.4))
    with pytest.raises(utils.BadInput, match="the starting model's value is not known: how"):
        best.choice(keep, known, None, None, "how")
    keep = SimpleNamespace(metric="MIA loss", direction=None, constraint=None)
    assert best.choice(keep, known, None, {"MIA loss": {"value": 0.45}}, "").target == 0.45
    assert (
        best.choice(SimpleNamespace(metric="PrivLeak", direction=None, constraint=None), known, None, None, "").target
        == 0
    )
    keep.direction = "max"
    assert best.choice(keep, known, None, None, "") == Choice("MIA loss", "max")


@pytest.fixture
def kept(tmp_path):
    """A `KeepBest` whose weights are a file with a number: what it keeps is known."""
    now = SimpleNamespace(weights=0)

    def save(folder):
        folder.mkdir()
        for name in ("model.safetensors", "config.json"):
            (folder / name).write_text(str(now.weights))

    def see(keep, *found):
        for step, one in enumerate(found, keep.step or 1):
            now.weights = step
            keep.look(step, one)

    return lambda choice: KeepBest(choice, save, tmp_path), see, tmp_path


def test_the_first_of_equal_ones_is_kept_and_placed(kept):
    new, see, out = kept
    keep = new(Choice("Forget Quality", "max", None, UTILITY))
    see(keep, scores(0.1), scores(0.3), scores(0.3), scores(0.9, 0.4))
    assert [path.name for path in out.iterdir()] == ["best-2"]
    (out / "best-9").mkdir()  # a killed run's
    for _ in range(2):  # a run that is killed before it is complete does it again
        keep.place()
        names = {"model.safetensors", "config.json", "written.txt", "best-2", "best-9"}
        assert {path.name for path in out.iterdir()} == names
        assert (out / "model.safetensors").read_text() == "2"
    run_folder.finish_run(out, {})
    assert {path.name for path in out.iterdir()} == names - {"best-2", "best-9"} | {"finished.json"}
    record = {"step": 2, "metric": "Forget Quality", "value": 0.3, "constraint": "Model Utility >= 0.5", "held": True}
    assert keep.record() == {"best": record}


def test_where_no_epoch_holds_the_constraint_the_nearest_is_saved(kept, caplog):
    new, see, out = kept
    keep = new(Choice("Forget Quality", "max", None, UTILITY))
    see(keep, scores(0.9, 0.1), scores(0.1, 0.3), scores(0.5, 0.2))
    keep.place()
    assert (out / "model.safetensors").read_text() == "2" and keep.record()["best"]["held"] is False
    assert "no epoch holds Model Utility >= 0.5: the model of step 2 is saved, which is nearest to it" in caplog.text


def test_what_has_no_number(kept, caplog):
    """Of the first evaluation it is refused; a later one can't be the best."""
    new, see, _ = kept
    choice = Choice("Forget Quality", "max")
    with pytest.raises(utils.BadInput, match="checkpoint-1 has no Forget Quality, whose reason its metrics.json tells"):
        see(new(choice), {})
    keep = new(choice)
    see(keep, scores(0.1), {})
    assert keep.step == 1 and "step 2 can't be the best" in caplog.text


def test_its_state_goes_on(kept, caplog):
    caplog.set_level("INFO")
    new, see, out = kept
    keep, again = (new(Choice("Forget Quality", "max")) for _ in range(2))
    see(keep, scores(0.1), scores(0.3))
    state = json.loads(json.dumps(keep.state_dict()))
    again.load_state_dict(state)
    again.look(3, scores(0.2))
    assert again.step == 2
    (out / "best-2").rename(out / "best-4")  # a later epoch replaced it before the kill
    again.load_state_dict(state)
    assert again.step is None and "step 2 gave way to a later one, which is found again" in caplog.text
    (out / "best-4").rename(out / "mine")
    with pytest.raises(utils.BadInput, match="best-2, the weights of the best epoch so far, is not there any more"):
        again.load_state_dict(state)


def by_hand(model, start, samples):
    """Mean KL(start || model) over all answer tokens, one sample at a time."""
    found = []
    for sample in samples:
        views = [
            forward.score(one, batches.collate({"retain": [sample]}, row=None))["retain"] for one in (model, start)
        ]
        found += losses.kl_completion(*views).tolist()
    return sum(found) / len(found)


@torch.no_grad()
def test_disruption():
    """0 before training; then by hand's number, with the start kept, live, and as the model without adapters."""
    samples = [sample for seed in range(5) for group in rows(seed) for sample in group]
    start, model = make("Llama"), make("Llama").train()
    measured = Disruption(len(samples), samples.__getitem__)
    again = Disruption(len(samples), samples.__getitem__)
    drawn = [sample for _, batch in measured.batches for sample in batch]
    assert len(drawn) == 64 and measured.batches == again.batches
    measured.keep(lambda: start, False)
    assert measured(model, None, False) == 0 == again(model, start, False) and model.training
    for parameter in model.parameters():
        parameter += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    value = measured(model, None, False)
    assert (
        value == again(model, start, False) == pytest.approx(by_hand(model.eval(), start, drawn), rel=1e-5)
        and value > 0
    )
    lora = loading.add_lora(make("Llama"), r=2, alpha=4, dropout=0.5)
    assert again(lora, None, False) == 0
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            parameter += 0.1
    assert again(lora, None, False) == pytest.approx(by_hand(lora.eval(), start, drawn), rel=1e-5)


def test_the_loss_curve_is_written_as_it_grows(tmp_path):
    args, state = SimpleNamespace(output_dir=str(tmp_path)), TrainerState(log_history=[{"loss": 1.0}])
    slow, at_once, control = callbacks.LossCurve(), callbacks.LossCurve(every=0), SimpleNamespace(should_save=False)
    slow.on_log(args, state, control)
    assert not list(tmp_path.iterdir())
    slow.last -= callbacks.EVERY
    for curve in (slow, at_once):
        state.log_history.append({"loss": 2.0})
        curve.on_log(args, state, control)
        assert json.loads((tmp_path / "trainer_state.json").read_text())["log_history"] == state.log_history
    state.log_history.append({"loss": 3.0})
    slow.on_log(args, state, control)
    assert len(json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]) == 3
    assert {path.name for path in tmp_path.iterdir()} == {"trainer_state.json", "written.txt"}


def test_a_run_resumed_at_an_epochs_end_does_what_was_left():
    """Once, and not within an epoch."""
    seen = []
    trainer = SimpleNamespace(method=SimpleNamespace(steps_per_epoch=2), log=lambda line: None)
    each = callbacks.EachEpoch(trainer, lambda step: seen.append(step) or {})
    args, control = SimpleNamespace(output_dir=""), SimpleNamespace(should_training_stop=False)
    for step in (0, 3, 4, 4):
        each.on_train_begin(args, TrainerState(global_step=step, max_steps=6), control)
    assert seen == [4] and each.done == 4
    again = callbacks.EachEpoch(trainer, lambda step: seen.append(step) or {}, always=False)
    again.load_state_dict(json.loads(json.dumps(each.state_dict())))
    for step in (4, 5, 6):
        again.on_train_begin(args, TrainerState(global_step=step, max_steps=6), control)
    assert seen == [4, 6] and not control.should_training_stop
    each.stopped = {"rule": "budget"}
    again.load_state_dict(each.state_dict())
    again.on_train_begin(args, TrainerState(global_step=4, max_steps=6), control)
    assert seen == [4, 6] and control.should_training_stop


def common(model, *more):
    """forget.py's settings: four epochs of two steps."""
    own = ("model_family=tiny", f"data_path={MINI}", f"model_path={model}", "split=forget05", "num_epochs=4")
    own += ("gradient_accumulation_steps=1", "lr=1e-3", "eval.ds_size=2", "eval.generation.max_length=80")
    return (*own, "eval.generation.max_new_tokens=2", *more)


@pytest.fixture
def run(model_folder, tmp_path, run_script, monkeypatch):
    """forget.py in this process; its folder and what it returned."""

    def run(*args, name="run"):
        monkeypatch.chdir(tmp_path)
        given = common(model_folder, "engine=ddp", "batch_size=10", *args, f"save_dir={name}")
        return tmp_path / name, run_script("forget.py", *given)

    return run


def read(file):
    return json.loads(file.read_text())


class Recorder(TrainerCallback):
    """A tracker, as transformers makes one for `report_to`."""

    seen: list = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append((state.global_step, dict(logs)))


def test_the_best_epoch_is_saved_and_a_budget_stops(run, capsys, monkeypatch):
    """Of a falling probability the first epoch has the largest; a run that stops there has the same bytes."""
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "recorder", Recorder)
    own = ("keep_best.metric=Prob. Forget", "keep_best.direction=max", "keep_best.constraint=Prob. Retain >= 0")
    kept, done = run("eval_while_train=true", "forget_loss=grad_diff", *own, "report_to=recorder", name="kept")
    found = [read(kept / f"checkpoint-{step}" / "metrics.json")["Prob. Forget"]["value"] for step in (2, 4, 6, 8)]
    assert found == sorted(found, reverse=True)
    finished, history = read(kept / "finished.json"), read(kept / "trainer_state.json")["log_history"]
    told = {"step": 2, "metric": "Prob. Forget", "value": found[0], "constraint": "Prob. Retain >= 0", "held": True}
    assert finished["best"] == told and finished["Prob. Forget"] == done["Prob. Forget"] == found[0]
    lines = [line for line in history if "eval_prob_forget" in line]
    assert [(line["step"], line["eval_prob_forget"]) for line in lines] == list(zip((2, 4, 6, 8), found, strict=True))
    tracked = [(step, line["eval_prob_forget"]) for step, line in Recorder.seen if "eval_prob_forget" in line]
    assert tracked == [(line["step"], line["eval_prob_forget"]) for line in lines]
    assert lines[0]["eval_model_utility"] == finished["Model Utility"]
    assert not list(kept.glob("best-*")) and "the model of step 2 is saved" in capsys.readouterr().out

    stopped, _ = run("evaluate=end", "forget_loss=grad_diff", "stop_on.budget=1e-6", name="stopped")
    finished = read(stopped / "finished.json")
    assert (finished["stopped"]["rule"], finished["stopped"]["step"]) == ("budget", 2)
    assert finished["Retain KL"] > 1e-6 and finished["Prob. Forget"] == found[0]
    assert [path.name for path in stopped.glob("checkpoint-*")] == ["checkpoint-2"]
    for name in ("model.safetensors", "config.json", "checkpoint-2/eval_log_aggregated.json"):
        assert (kept / name).read_bytes() == (stopped / name).read_bytes(), name
    steps = [[line["loss"] for line in one if "loss" in line] for one in
             (history, read(stopped / "trainer_state.json")["log_history"])]  # fmt: skip
    assert steps[0][:2] == steps[1] and len(steps[0]) == 8
    assert "stop_on.budget ends the run at step 2 of 8" in capsys.readouterr().out


class Stopped(TrainerCallback):
    def on_train_begin(self, args, state, control, **kwargs):
        control.should_training_stop = True


def test_a_run_that_is_stopped_before_a_step_trains_no_more(run, model_folder, monkeypatch):
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "stopped", Stopped)
    folder, _ = run("report_to=stopped", "eval_while_train=true")
    start, end = (load_file(path / "model.safetensors") for path in (model_folder, folder))
    assert start.keys() == end.keys() and all(torch.equal(start[name], end[name]) for name in start)
    assert not [line for line in read(folder / "trainer_state.json")["log_history"] if "loss" in line]


class Fault(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise ZeroDivisionError


@pytest.mark.slow
def test_what_a_crash_leaves(run, monkeypatch):
    """The best weights so far, whole, and the log; a run that replaces this one leaves nothing of them."""
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "fault", Fault)
    own = ("eval_while_train=true", "keep_best.metric=Prob. Forget", "num_epochs=2", "overwrite_dir=true")
    with pytest.raises(ZeroDivisionError):
        run(*own, "report_to=fault")
    folder, _ = run(*own, name="other")
    best_so_far = folder.with_name("run") / "best-2"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(best_so_far), AutoTokenizer.from_pretrained(best_so_far)
    assert model.config.vocab_size == len(tokenizer)
    assert [line["step"] for line in read(best_so_far.parent / "trainer_state.json")["log_history"]] == [1, 2, 2, 3]
    run(*own)
    assert {path.name for path in best_so_far.parent.iterdir()} == {path.name for path in folder.iterdir()}


def test_a_collapse_stops(run, tmp_path, capsys):
    """Of a random model, beside a start that is of use; without a start it is refused, and nothing is left."""
    asked = ("eval_while_train=true", "stop_on.collapse=true")
    with pytest.raises(SystemExit, match="2"):
        run(*asked)
    assert "stop_on.collapse=true compares with the starting model" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        run(
            "eval_while_train=true", "keep_best.metric=Model Utility", "keep_best.constraint=Model Utility >= 0.9*start"
        )
    assert "the starting model's value is not known: evaluate it, python evaluate_util.py" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    (tmp_path / "start.json").write_text(json.dumps({"Model Utility": {"value": 0.6}}))
    run(*asked, "eval.start_result=start.json")
    finished = read(tmp_path / "run" / "finished.json")
    assert finished["stopped"] == {"rule": "collapse", "step": 2, "why": finished["Collapse"][0]}
    assert finished["Collapse"][0].startswith("Model Utility is 0, below 0.5 times")
    assert (tmp_path / "run" / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "loss"), [("ddp", "grad_diff"), ("zero3", "grad_diff"), ("zero3", "KL"), ("fsdp", "KL")]
)
def test_on_two_processes(run, launch, model_folder, tmp_path, engine, loss):
    """Sharded or not, with a reference model or without: the same epoch is the best, and its weights are saved."""
    config = read(REPO / "config" / "ds_config.json")
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # else it shards nothing of a tiny model
    (tmp_path / "ds.json").write_text(json.dumps(config))
    own = ("eval_while_train=true", f"forget_loss={loss}", "stop_on.budget=0.05")
    own += ("keep_best.metric=Prob. Real Authors", "keep_best.constraint=Retain KL <= 0.05")
    one, _ = run(*own, name="one")
    keys = ("engine=deepspeed", "ds_config=ds.json") if engine == "zero3" else (f"engine={engine}",)
    args = (*common(model_folder), *own, "batch_size=5", *keys, "save_dir=two")
    launch("forget.py", *args, processes=2, cwd=tmp_path)
    found, expected = (read(tmp_path / name / "finished.json") for name in ("two", "one"))
    assert found["best"] == {**expected["best"], "value": pytest.approx(expected["best"]["value"], rel=1e-4)}
    assert found["best"]["step"] == 4 and found["stopped"]["step"] == expected["stopped"]["step"] == 6
    assert found["Retain KL"] == pytest.approx(expected["Retain KL"], rel=1e-3)
    lines = [line for line in read(tmp_path / "two" / "trainer_state.json")["log_history"] if "eval_retain_kl" in line]
    assert [line["step"] for line in lines] == [2, 4, 6]
    weights = [
        dict(AutoModelForCausalLM.from_pretrained(tmp_path / name).named_parameters()) for name in ("one", "two")
    ]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=0, atol=2e-3)
