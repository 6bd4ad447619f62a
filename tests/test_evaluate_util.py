"""The evaluation against golden runs, against itself where it is made again, and against transformers' own loss."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers import MINI, REPO, SHARED, evaluate, needs_shared

import data_module
import utils
from tofu.evaluation import evaluator, inference, logs, measures, row_logs
from tofu.evaluation.metrics import tofu as tofu_metrics
from tofu.models import families, folders, loading
from tofu.runtime import run_folder


@needs_shared
@pytest.mark.parametrize(
    "name", ["tiny-llama-ga", *(pytest.param(f"tiny-llama{one}", marks=pytest.mark.slow) for one in ("", "-retain90"))]
)
def test_golden_logs(name, tmp_path):
    """compare_logs.py: losses to 1e-4, counts exactly, ROUGE where the golden truth is whole."""
    golden = SHARED / "golden"
    evaluate(golden / "models" / name, SHARED / "tofu", tmp_path, family="llama2-7b", ds_size=300)
    done = subprocess.run(
        [
            *(sys.executable, golden / "compare_logs.py", tmp_path / logs.AGGREGATED),
            *(golden / "logs" / name / "eval_log_aggregated.json", "1e-4"),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


def test_loss_is_the_causal_lm_loss(model_folder, tmp_path):
    """Row 0 of each set: the model's own loss over the same labels."""
    log = evaluate(model_folder, MINI, tmp_path, ds_size=2)
    tokenizer, model = folders.load_tokenizer(str(model_folder), None), loading.load(str(model_folder)).eval()
    row = data_module.load_rows(str(MINI), "forget10_perturbed", ("question", "answer"))[0]
    prompt, text = f"Question: {row['question']}\n", f"Question: {row['question']}\n{row['answer']}"
    ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
    labels = ids.clone()
    labels[:, : len(tokenizer(prompt)["input_ids"])] = -100
    with torch.no_grad():
        expected = model(ids, labels=labels).loss.item()
    found = log["eval_log_forget.json"]
    assert found["avg_gt_loss"]["0"] == pytest.approx(expected, abs=1e-5)
    assert found["num_token_gt"]["0"] == int((labels != -100).sum())
    assert found["gt_loss"]["0"] == pytest.approx(expected * found["num_token_gt"]["0"], rel=1e-5)


def test_budget_is_the_rows_own(model_folder, tmp_path):
    """A random model never stops: prompt and generation make max_length tokens, or max_new_tokens new ones."""
    tokenizer = folders.load_tokenizer(str(model_folder), None)
    model = loading.load(str(model_folder)).eval()
    family = families.family("tiny")
    rows = data_module.load_rows(str(MINI), "forget01_perturbed", ("question", "answer"))
    prompts = [tokenizer(data_module.prompt(family, row["question"]))["input_ids"] for row in rows]
    texts, longest = (
        [
            tokenizer.decode(tokens, skip_special_tokens=True).strip()
            for tokens in inference.greedy(model, prompts, budgets, [2], at_once=3)
        ]
        for budgets in ([7] * len(prompts), [100 - len(prompt) for prompt in prompts])
    )
    for i, row in enumerate(rows):
        room = 100 - len(tokenizer(data_module.prompt(family, row["question"]))["input_ids"])
        alone = model.generate(
            torch.tensor([tokenizer(data_module.prompt(family, row["question"]))["input_ids"]]),
            max_new_tokens=room,
            do_sample=False,
            eos_token_id=2,
            pad_token_id=2,
        )[0, -room:]
        assert longest[i] == tokenizer.decode(alone, skip_special_tokens=True).strip()
        assert longest[i].startswith(texts[i]) and len(texts[i]) < len(longest[i])


def test_prompts_that_leave_no_room_are_told(model_folder, tmp_path):
    with pytest.raises(utils.BadInput, match="max_length=10 leaves no token of an answer"):
        evaluate(model_folder, MINI, tmp_path, max_length=10)


def test_columns_of_the_benchmark(model_folder, tmp_path):
    """The files and keys that the public benchmark writes, in row order; nothing is left aside."""
    log = evaluate(model_folder, MINI, tmp_path, ds_size=3, max_length=60)
    plain = {
        *("avg_gt_loss", "gt_loss", "num_token_gt", "generated_text", "rouge1_recall", "rougeL_recall"),
        *("average_perturb_loss", "avg_paraphrased_loss", "truth_ratio", "paraphrased_loss", "perturb_loss"),
        *("num_token_paraphrased", "num_token_perturb"),
    }
    assert [*log] == [
        "eval_log.json",
        "eval_real_author_wo_options.json",
        "eval_real_world_wo_options.json",
        "eval_log_forget.json",
    ]
    for task, one in log.items():
        assert set(one) == {*plain, *(["normalized_gt_loss"] if "real" in task else [])}
        assert json.loads((tmp_path / task).read_text()) == one
        assert len(one["perturb_loss"]["0"]) == (3 if "real" in task else 5)
    beside = {logs.AGGREGATED, measures.METRICS, evaluator.REPORT, run_folder.WRITTEN}
    assert {path.name for path in tmp_path.iterdir()} == {*log, *beside}


def contents(folder) -> dict[str, object]:
    """What an evaluation leaves, but for what says when and how it was called."""
    scores = json.loads((folder / "finished.json").read_text())
    named = {key: value for key, value in scores.items() if key not in ("manifest", "stages")}
    others = ("versions.json", "config.yaml", "finished.json")
    return {**{p.name: p.read_bytes() for p in folder.iterdir() if p.name not in others}, "finished.json": named}


def test_nothing_is_evaluated_twice(evaluated, monkeypatch, caplog, capsys):
    """overwrite=false: complete sets stay and no model is loaded; what differs is made again, and the log says why."""
    folder = evaluated()
    whole = contents(folder)
    loaded = []
    load = loading.load_frozen
    monkeypatch.setattr(loading, "load_frozen", lambda *args, **kwargs: loaded.append(1) or load(*args, **kwargs))
    evaluated("overwrite=false", "batch_size=7")
    assert not loaded and contents(folder) == whole
    assert capsys.readouterr().out.count("complete, and not evaluated again") == 4

    (folder / "eval_log.json").write_text("{}")  # not the file that the fingerprint was made of
    (folder / "eval_log_forget.json").unlink()
    (folder / ".writing.eval_log_forget.json.x1").write_text('{"a')  # what a killed write leaves
    evaluated("overwrite=false")
    said = capsys.readouterr().out
    assert "eval_log: evaluated, because it has no fingerprint" in said
    assert "eval_log_forget: evaluated, because it is not there" in said
    assert loaded == [1] and contents(folder) == whole

    evaluated("overwrite=false", "generation.max_length=90")
    assert capsys.readouterr().out.count("evaluated, because it was made with other generation") == 4
    evaluated("overwrite=false", "generation.max_length=90", "split=forget05")
    said = capsys.readouterr().out
    assert (
        "eval_log_forget: evaluated, because it was made with other data" in said
        and said.count("not evaluated again") == 3
    )


def test_an_evaluation_that_stops_goes_on_where_it_was(evaluated, monkeypatch, capsys):
    """Stopped in the third set: the first two are not made again; the bytes are the uninterrupted run's."""
    whole = contents(evaluated(save_dir="whole"))
    score, calls = row_logs.score_rows, []

    def stops(model, task, *how):
        calls.append(task.data.task)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return score(model, task, *how)

    monkeypatch.setattr(row_logs, "score_rows", stops)
    with pytest.raises(SystemExit, match="130"):
        evaluated(save_dir="cut")
    monkeypatch.setattr(row_logs, "score_rows", score)
    capsys.readouterr()
    folder = evaluated("overwrite=false", save_dir="cut")
    assert capsys.readouterr().out.count("not evaluated again") == 2
    assert contents(folder) == whole


def test_an_evaluation_removes_only_its_own(evaluated, model_folder, tmp_path, capsys):
    """A folder with a model, or with anything that no evaluation writes, is refused whatever `overwrite` says."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    for folder in (model_folder, "mine"):
        before = {path.name for path in (tmp_path / folder).iterdir()}
        with pytest.raises(SystemExit, match="2"):
            evaluated(save_dir=str(folder))
        assert "holds something else than an evaluation" in capsys.readouterr().err
        assert {path.name for path in (tmp_path / folder).iterdir()} == before


def test_bad_input_leaves_an_earlier_evaluation_alone(evaluated, capsys):
    whole = contents(evaluated())
    for args, said in (
        (["generation.max_length=5"], "generation.max_length=5 leaves no token of an answer"),
        (["perturbed_answer_key=answer"], "perturbed_answer_key=answer must be a list of wrong answers"),
        (
            ["answer_key=perturbed_answer"],
            "the perturbed_answer of row 0 is ['It is Tobiah Thornegate",
        ),
        (["truth_ratio=harmonic"], "truth_ratio=harmonic is unknown"),
        (["save_format=[tofu,muse]"], "save_format=muse is unknown"),
    ):
        with pytest.raises(SystemExit, match="2"):
            evaluated(*args)
        assert said in capsys.readouterr().err
    assert contents(evaluated("overwrite=false")) == whole


def test_paraphrased_questions_and_a_set_of_ones_own(evaluated, capsys):
    """Sets without paraphrases keep their question, and it is said; a fifth set is shown and counts in nothing."""
    plain = json.loads((evaluated() / logs.AGGREGATED).read_text())
    folder = evaluated(
        "question_key=paraphrased_question",
        "split_list=[retain_perturbed,real_authors_perturbed,world_facts_perturbed,forget10_perturbed,holdout01_perturbed]",
        "eval_task=[eval_log,eval_real_author_wo_options,eval_real_world_wo_options,eval_log_forget,eval_log_holdout]",
        "base_answer_key=[paraphrased_answer,answer,answer,paraphrased_answer,paraphrased_answer]",
        save_dir="paraphrased",
    )
    said = capsys.readouterr().out
    assert said.count("there is no paraphrased_question, so question is taken instead") == 2
    log = json.loads((folder / logs.AGGREGATED).read_text())
    row = data_module.load_rows(str(MINI), "forget10_perturbed", ("paraphrased_question",))[0]
    assert row["paraphrased_question"] in log["eval_log_forget.json"]["generated_text"]["0"][0]
    assert log["eval_log_forget.json"]["avg_gt_loss"] != plain["eval_log_forget.json"]["avg_gt_loss"]
    assert log["eval_real_world_wo_options.json"] == plain["eval_real_world_wo_options.json"]
    scores = json.loads((folder / "finished.json").read_text())
    assert "Model Utility" in scores and not any("holdout" in name for name in scores)
    assert "## eval_log_holdout: `eval_log_holdout.json`" in (folder / evaluator.REPORT).read_text()
    with pytest.raises(ValueError, match="questions differ"):
        tofu_metrics.forget_quality(log, plain)


@needs_shared
@pytest.mark.parametrize(
    ("golden_bytes", "processes"),
    [(40, 2), *(pytest.param(300, processes, marks=pytest.mark.slow) for processes in (2, 3))],
    indirect=["golden_bytes"],
)
def test_golden_logs_are_the_same_bytes_on_any_number_of_processes(launch, golden_bytes, tmp_path, processes):
    ds_size, expected = golden_bytes
    model = SHARED / "golden" / "models" / "tiny-llama"
    args = ("model_family=llama2-7b", f"data_path={SHARED / 'tofu'}", f"model_path={model}", f"ds_size={ds_size}")
    launch("evaluate_util.py", *args, "save_dir=out", processes=processes, cwd=tmp_path)
    assert (tmp_path / "out" / logs.AGGREGATED).read_bytes() == expected


@pytest.fixture(scope="module")
def golden_bytes(request, tmp_path_factory):
    """So many rows a set; the aggregated log of golden model tiny-llama from this one process."""
    folder, model = tmp_path_factory.mktemp("golden"), SHARED / "golden" / "models" / "tiny-llama"
    evaluate(model, SHARED / "tofu", folder, family="llama2-7b", ds_size=request.param)
    return request.param, (folder / logs.AGGREGATED).read_bytes()


@pytest.mark.slow
def test_kill_at_any_moment(launch, model_folder, tmp_path):
    """kill -9 at ten moments, two processes: every file is whole, and going on gives the uninterrupted bytes."""
    args = ["model_family=tiny", f"data_path={MINI}", f"model_path={model_folder}", "batch_size=2", "overwrite=false"]
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    command = [*start, str(REPO / "evaluate_util.py"), *args]
    began = time.monotonic()
    launch("evaluate_util.py", *args, "save_dir=whole", processes=2, cwd=tmp_path)
    took = time.monotonic() - began
    draw, folder, held = random.Random(0), tmp_path / "cut", set()
    for _ in range(10):
        job = subprocess.Popen(
            [*command, f"save_dir={folder}"], cwd=tmp_path, start_new_session=True, stdout=-3, stderr=-3
        )
        time.sleep(draw.uniform(0.4, 1.0) * took)
        for path in folder.glob("*") if folder.is_dir() else ():
            if path.suffix == ".json" and not path.name.startswith("."):
                json.loads(path.read_text())
                held.add(path.name)
        os.killpg(job.pid, signal.SIGKILL)
        job.wait()
    assert len(held) > 3
    launch("evaluate_util.py", *args, "save_dir=cut", processes=2, cwd=tmp_path)
    assert contents(folder) == contents(tmp_path / "whole")
