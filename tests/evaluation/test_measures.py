"""metrics.json of an evaluation: what it holds by default and by choice, and where it comes from."""

import json

import numpy as np
import pytest
from helpers import MINI, evaluate

import data_module
from tofu.evaluation import inference, logs, measures, passes, sets
from tofu.evaluation.metrics import declared, rows, table
from tofu.evaluation.metrics import tofu as tofu_metrics
from tofu.models import families, folders, loading


def held(folder, name: str = measures.METRICS) -> dict:
    return json.loads((folder / name).read_text())


def test_the_default_holds_tofus_own(model_folder, tmp_path):
    """Values, intervals and rows are the statistics'; what is not there says why; no numbers per row are kept."""
    log = evaluate(model_folder, MINI, tmp_path, ds_size=4, max_length=60)
    found, known = held(tmp_path), tofu_metrics.statistics(log, None)
    assert [*found] == [metric.name for metric in tofu_metrics.METRICS]
    for name, value in known.values.items():
        assert found[name]["value"] == value and found[name]["interval"] == known.intervals[name]
        assert found[name]["n"] == (None if name == "Model Utility" else 4) and found[name]["group"] == "tofu"
    assert found["Truth Ratio Forget"]["direction"] == "max" and found["Prob. Forget"]["direction"] == "min"
    assert found["Forget Quality"]["value"] is None and found["Forget Quality"]["reason"] == "it needs retain_result"
    assert not (tmp_path / measures.ROWS).exists()


def test_a_chosen_group_is_the_mean_of_its_rows(evaluated):
    folder = evaluated("metrics=[memorisation]", "ds_size=7")
    found, kept, log = held(folder), held(folder, measures.ROWS), held(folder, logs.AGGREGATED)
    assert [*found] == [metric.name for metric in table.chosen(["memorisation"])]
    for task, of in (("eval_log_forget", "Forget"), ("eval_log", "Retain")):
        for name, values in kept[task]["rows"].items():
            assert name.endswith(of) and len(values) == 7
            low, high = found[name]["interval"]
            assert found[name]["value"] == np.mean(values) and found[name]["n"] == 7 and low <= np.mean(values) <= high
        one = log[f"{task}.json"]
        assert kept[task]["rows"][f"ROUGE-L Recall {of}"] == list(one["rougeL_recall"].values())
        assert kept[task]["rows"][f"ROUGE-1 Recall {of}"] == list(one["rouge1_recall"].values())
        probable = list(np.exp(-np.array(list(one["avg_paraphrased_loss"].values()))))
        assert kept[task]["rows"][f"Paraphrased Probability {of}"] == pytest.approx(probable, rel=1e-12)
        assert found[f"Truth Ratio (geometric) {of}"]["value"] == pytest.approx(found[f"Truth Ratio {of}"]["value"])
    scores = held(folder, "finished.json")
    assert scores["Extraction Strength Forget"] == found["Extraction Strength Forget"]["value"]


def test_nothing_else_changes_with_the_metrics(evaluated):
    """Every other file has the default's bytes, but for what names the metrics or their file."""
    files = [
        {path.name: path.read_bytes() for path in evaluated(f"metrics=[{names}]", save_dir=names).iterdir()}
        for names in ("tofu", "memorisation")
    ]
    differ = {name for name in files[0].keys() | files[1] if files[0].get(name) != files[1].get(name)}
    own = {measures.METRICS, measures.ROWS, "written.txt"}
    assert differ <= {*own, "config.yaml", "versions.json", "finished.json"} and own <= differ


def test_kept_rows_stand_for_new_ones(evaluated, capsys):
    """overwrite=false: a set is evaluated again if the chosen metrics' numbers are not there or of another form."""
    chosen = "metrics=[extraction_strength,exact_memorisation]"
    folder = evaluated(chosen)
    whole = {name: (folder / name).read_bytes() for name in (measures.METRICS, measures.ROWS)}
    capsys.readouterr()

    def again(*args: str) -> str:
        evaluated("overwrite=false", *args)
        return capsys.readouterr().out

    assert again(chosen).count("not evaluated again") == 4
    assert whole == {name: (folder / name).read_bytes() for name in whole}
    said = again("metrics=[probability]")
    assert "eval_log: evaluated, because its rows have no Probability Retain" in said
    assert said.count("not evaluated again") == 2  # the two that no such metric reads
    assert again("metrics=probability", "compat=openunlearning").count("were made with other compat") == 2
    (folder / measures.ROWS).unlink()
    assert again(chosen).count("its metrics have no numbers per row") == 2
    assert (
        held(folder)["Extraction Strength Forget"] == json.loads(whole[measures.METRICS])["Extraction Strength Forget"]
    )
    (folder / "eval_log_forget.json").unlink()
    assert "eval_log_forget: evaluated, because it is not there" in again(chosen)
    assert whole == {name: (folder / name).read_bytes() for name in whole}


def test_a_set_that_is_not_evaluated_leaves_its_reason(evaluated):
    folder = evaluated(
        *("metrics=[extraction_strength]", "split_list=[forget10_perturbed]", "eval_task=[eval_log_forget]"),
        "base_answer_key=[paraphrased_answer]",
    )
    found = held(folder)
    assert found["Extraction Strength Retain"]["value"] is None
    assert found["Extraction Strength Retain"]["reason"] == "not evaluated: Retain"
    assert found["Model Utility"]["reason"] == "not evaluated: Real Authors, Real World, Retain"
    assert found["Extraction Strength Forget"]["n"] == 4


def test_the_second_half_is_what_the_model_writes(model_folder):
    """Greedy decoding by transformers from the first half of the answer's tokens; a row of one token has none."""
    keys = ("question", "answer", "paraphrased_answer", "perturbed_answer")
    data = data_module.load_rows(str(MINI), "forget10_perturbed", keys, 3)
    data[1] = {**data[1], "answer": "a"}
    tokenizer, model = folders.load_tokenizer(str(model_folder), None), loading.load(str(model_folder)).eval()
    task = sets.prepare(
        sets.EvalSet("eval_log_forget", data, *keys), tokenizer, families.family("tiny"), max_length=200
    )
    found = passes.completion(passes.Asked(model, tokenizer, task, [""] * 3, (2, 1), False, {}))
    assert found[1] is None
    for i in (0, 2):
        text = f"{task.questions[i]}{data[i]['answer']}"
        ids = tokenizer(text)["input_ids"]
        n = len(ids) - len(tokenizer(task.questions[i])["input_ids"])
        given = ids[: len(ids) - n + n // 2]
        written = inference.torch.tensor([given])
        written = model.generate(written, max_new_tokens=n - n // 2, do_sample=False, eos_token_id=2, pad_token_id=2)
        texts = [tokenizer.decode(one[len(given) :], skip_special_tokens=True).strip() for one in (ids, written[0])]
        assert found[i] == tuple(texts)


def test_a_metric_that_lacks_something_is_null_with_its_reason():
    """Of other metrics, of the retain model, of a column that no row has; those after it say so too."""
    several = [
        declared.Metric("A Forget", float, (), "min", "x", "Forget", "A"),
        declared.Metric("B", lambda context: context.value("A Forget"), ("A Forget",), "min", "x"),
        declared.Metric("C", lambda context: context.retain_value("B"), ("B",), "min", "x"),
        declared.Metric("D", lambda context: context.start_value("B"), ("B",), "min", "x"),
        declared.Metric("E", lambda context: 2 * context.retain_value("E"), (), "min", "x"),
    ]
    context = rows.Context({"A Forget": [None, None]}, retain={"E": {"value": 0.25}, "B": {"value": None}})
    found = table.values(several, context)
    assert [one.reason for one in found.values()] == [
        "no row has A Forget",
        "no row has A Forget",
        "retain_result has no B: evaluate that model with the same metrics",
        "it needs start_result",
        None,
    ]
    assert found["E"] == declared.Value(0.5)
    assert table.record(several, found)["B"]["reason"] == "no row has A Forget"
    some = rows.Context({"A Forget": [1.0, None, 3.0]})
    assert table.values(several[:2], some)["B"].value == 2.0 and some.values["A Forget"].n == 2


def test_an_interval_holds_the_mean_as_often_as_it_says():
    """Of 200 samples of 100 numbers, 95 % of the intervals hold the true mean, give or take three deviations."""
    draw = np.random.default_rng(0)
    found = [rows.mean_of(draw.exponential(size=100), "x").interval for _ in range(200)]
    assert 0.95 - 3 * 0.0155 - 0.02 <= np.mean([low <= 1 <= high for low, high in found]) <= 1
    assert rows.mean_of([1.0, 2.0, 4.0], "x") == rows.mean_of([1.0, 2.0, 4.0], "x")
    assert (rows.draws(50, "x") != rows.draws(50, "y")).any()


def test_during_training_the_metrics_are_the_same(run_script, model_folder, tmp_path, monkeypatch):
    """forget.py with eval.metrics writes what evaluate_util.py writes of the model that it saved."""
    monkeypatch.chdir(tmp_path)
    small = ["model_family=tiny", f"data_path={MINI}", "split=forget01"]
    run_script(
        *("forget.py", *small, f"model_path={model_folder}", "num_epochs=1", "lr=1e-3", "save_dir=run"),
        *("batch_size=1", "gradient_accumulation_steps=1"),
        *("eval_while_train=true", "eval.metrics=[memorisation]", "eval.ds_size=4", "eval.generation.max_length=80"),
    )
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    run_script(
        *("evaluate_util.py", *small, "model_path=run", "save_dir=out", "metrics=[memorisation]", "ds_size=4"),
        "generation.max_length=80",
    )
    during, after = held(checkpoint), held(tmp_path / "out")
    assert [*during] == [*after] and "Exact Memorisation Forget" in during
    for name, one in during.items():
        assert one["value"] == (None if one["value"] is None else pytest.approx(after[name]["value"], abs=1e-6)), name


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "processes"), [("ddp", 2), ("ddp", 3), ("deepspeed", 2)])
def test_metrics_are_the_same_bytes_on_any_number_of_processes(launch, model_folder, tmp_path, engine, processes):
    """All groups, and the passes that a sharded model can do; ds_config.json is ZeRO-3."""
    groups = "metrics=[memorisation,privacy,fluency,aggregates,verbatim_completion]"
    args = ("model_family=tiny", f"data_path={MINI}", f"model_path={model_folder}", "ds_size=9", "batch_size=2", groups)
    args = (*args, "generation.max_length=80", f"reference_model={model_folder}", "save_format=openunlearning")
    launch("evaluate_util.py", *args, "save_dir=one", cwd=tmp_path)
    launch("evaluate_util.py", *args, "save_dir=two", f"engine={engine}", processes=processes, cwd=tmp_path)
    names = (measures.METRICS, measures.ROWS, logs.AGGREGATED, "TOFU_EVAL.json", "eval_report.md")
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
