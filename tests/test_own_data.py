"""docs/own_data.md, run as it is printed; and what is refused before a model is loaded."""

import json
import re
import shlex

import pytest
from helpers import MINI, REPO

from tofu.models import families

PAGE = (REPO / "docs" / "own_data.md").read_text()


@pytest.fixture
def mydata(tmp_path, monkeypatch, model_folder):
    """The page's folder: drop.jsonl and keep.csv, and both.jsonl of all rows; `tiny` is the random model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(families.entries().tiny, "hf_key", str(model_folder))
    folder = tmp_path / "mydata"
    folder.mkdir()
    drop = re.search(r"```text\n(.*?)```", PAGE, re.S)[1]
    (folder / "drop.jsonl").write_text(drop)
    keep = [{"question": f"What is {i} and {i}?", "answer": f"It is {2 * i}."} for i in range(6)]
    (folder / "keep.csv").write_text(
        "question,answer\n" + "".join(f"{row['question']},{row['answer']}\n" for row in keep)
    )
    (folder / "both.jsonl").write_text(drop + "".join(json.dumps(row) + "\n" for row in keep))
    return folder


def commands() -> list[list[str]]:
    return [shlex.split(line)[1:] for line in re.findall(r"^python .*$", PAGE, re.M)]


def test_the_page(mydata, run_script, tmp_path, capsys):
    """Finetune, forget, evaluate: without wrong answers no truth ratio, no model utility, and this is logged."""
    small = ("batch_size=1", "gradient_accumulation_steps=1")
    for script, *args in commands():
        run_script(script, *args, *(small if script != "evaluate_util.py" else ()))
    assert capsys.readouterr().out.count("no column perturbed_answer, so") == 2
    folder = tmp_path / "runs" / "mine" / "evaluation"
    scores = json.loads((folder / "finished.json").read_text())
    assert {name for name in scores if name[0].isupper()} == {
        *("ROUGE Forget", "Prob. Forget", "ROUGE Retain", "Prob. Retain", "Confidence Intervals"),
    }
    assert len(json.loads((folder / "eval_log.json").read_text())["avg_gt_loss"]) == 6
    assert "Without wrong answers" in (folder / "eval_report.md").read_text()


FORGET = ("model_path=MODEL", "model_family=tiny", "data_path=mydata", "split=drop", "save_dir=run")
EVALUATE = (*FORGET, "split_list=[drop]", "eval_task=[eval_log_forget]")


@pytest.mark.parametrize(
    ("script", "args", "said"),
    [
        ("forget.py", (), "split=drop: forget01, forget05 or forget10; or name the rows to keep too: retain_split="),
        ("forget.py", ("retain_split=kept",), "retain_split=kept is not in mydata: it has both, drop, keep"),
        (
            "forget.py",
            ("retain_split=both", "forget_loss=grad_diff"),
            "retain_split=both holds 2 of the 2 rows to forget",
        ),
        ("forget.py", ("retain_split=keep", "question_key=q"), "no column q (it has question, answer)"),
        ("evaluate_util.py", ("base_answer_key=answer", "perturbed_answer_key=wrong"), "no column wrong (it has"),
        (
            "evaluate_util.py",
            ("base_answer_key=answer", "retain_result=LOG"),
            "the forget set has no column perturbed_answer",
        ),
    ],
)
def test_refused(script, args, said, mydata, run_script, model_folder, tmp_path, capsys):
    log = tmp_path / "log.json"
    log.write_text(
        json.dumps({"eval_log_forget.json": {"avg_paraphrased_loss": {"0": 1.0}, "average_perturb_loss": {"0": [1.0]}}})
    )
    base = EVALUATE if script == "evaluate_util.py" else FORGET
    words = [arg.replace("MODEL", str(model_folder)).replace("LOG", str(log)) for arg in (*base, *args)]
    with pytest.raises(SystemExit, match="2"):
        run_script(script, *words)
    assert said in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_overlap_may_be_allowed(mydata, run_script, model_folder, tmp_path):
    words = [arg.replace("MODEL", str(model_folder)) for arg in FORGET]
    more = ("retain_split=both", "allow_overlap=true", "forget_loss=grad_diff", "batch_size=1", "num_epochs=2")
    run_script("forget.py", *words, *more, "gradient_accumulation_steps=1")
    assert (tmp_path / "run" / "finished.json").is_file() and MINI.is_dir()
