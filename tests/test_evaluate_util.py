"""The evaluation against golden runs, against itself on other batches, and against transformers' own loss."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import MINI, SHARED, needs_shared

import data_module
import evaluate_util
import inference
import models
import schema


def evaluate(path, data_path, folder, *, family="tiny", ds_size=None, split="forget10", **kwargs) -> dict:
    """Evaluate the model in `path` in this process; the aggregated log."""
    model_family = schema.family(family)
    tokenizer = models.load_tokenizer(str(path), None)
    names = ("retain_perturbed", "real_authors_perturbed", "world_facts_perturbed", f"{split}_perturbed")
    tasks = ("eval_log", "eval_real_author_wo_options", "eval_real_world_wo_options", "eval_log_forget")
    bases = ("paraphrased_answer", "answer", "answer", "paraphrased_answer")
    room = {"max_length": kwargs.pop("max_length", 200), "max_new_tokens": kwargs.pop("max_new_tokens", None)}
    sets = []
    for name, task, base in zip(names, tasks, bases, strict=True):
        keys = ("question", "answer", base, "perturbed_answer")
        rows = data_module.load_rows(str(data_path), name, keys, ds_size)
        sets.append(evaluate_util.prepare(evaluate_util.EvalSet(task, rows, *keys), tokenizer, model_family, **room))
    evaluate_util.evaluate(models.load(str(path)), tokenizer, sets, folder, **{"batch_size": 30, **kwargs})
    return json.loads((folder / evaluate_util.AGGREGATED).read_text())


@needs_shared
@pytest.mark.parametrize("name", ["tiny-llama", "tiny-llama-ga", "tiny-llama-retain90"])
def test_golden_logs(name, tmp_path):
    """compare_logs.py: losses to 1e-4, counts exactly, ROUGE where the golden truth is whole."""
    golden = SHARED / "golden"
    evaluate(golden / "models" / name, SHARED / "tofu", tmp_path, family="llama2-7b", ds_size=300)
    done = subprocess.run(
        [
            *(sys.executable, golden / "compare_logs.py", tmp_path / evaluate_util.AGGREGATED),
            *(golden / "logs" / name / "eval_log_aggregated.json", "1e-4"),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


def test_loss_is_the_causal_lm_loss(model_folder, tmp_path):
    """Row 0 of each set: the model's own loss over the same labels."""
    log = evaluate(model_folder, MINI, tmp_path, ds_size=2)
    tokenizer, model = models.load_tokenizer(str(model_folder), None), models.load(str(model_folder)).eval()
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


def test_no_row_depends_on_its_batch(model_folder, tmp_path):
    """Batches of one row and of thirty: the same losses to 1e-5 and the same generations."""
    one = evaluate(model_folder, MINI, tmp_path / "one", ds_size=6, batch_size=1, max_length=80)
    many = evaluate(model_folder, MINI, tmp_path / "many", ds_size=6, batch_size=30, max_length=80)
    for task, log in one.items():
        assert list(log["gt_loss"]) == [str(i) for i in range(6)]
        for i, loss in log["avg_gt_loss"].items():
            assert many[task]["avg_gt_loss"][i] == pytest.approx(loss, abs=1e-5)
            assert many[task]["generated_text"][i] == log["generated_text"][i]


def test_budget_is_the_rows_own(model_folder, tmp_path):
    """A random model never stops: prompt and generation make max_length tokens, or max_new_tokens new ones."""
    tokenizer = models.load_tokenizer(str(model_folder), None)
    model = models.load(str(model_folder)).eval()
    family = schema.family("tiny")
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
    with pytest.raises(evaluate_util.BadInput, match="max_length=10 leaves no token of an answer"):
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
    assert {path.name for path in tmp_path.iterdir()} == {*log, evaluate_util.AGGREGATED, evaluate_util.REPORT}
