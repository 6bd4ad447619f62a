"""The leaderboard script as a user runs it: from another folder, on logs worked out by hand, on logs that are none."""

import csv
import json
import math

import pytest

from tofu.evaluation import logs
from tofu.evaluation.metrics import tofu as tofu_metrics


def write_log(path, right: float, wrong: list[float], rows: int = 2) -> None:
    """An aggregated log whose rows are alike: mean losses `right` and `wrong`, ROUGE 1/2."""
    values = {"avg_gt_loss": right, "avg_paraphrased_loss": right, "average_perturb_loss": wrong, "rougeL_recall": 0.5}
    one = {name: {str(i): value for i in range(rows)} for name, value in values.items()}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({f"{task}.json": one for task in logs.TASKS.values()}))


@pytest.fixture
def two_logs(tmp_path):
    """A folder with the oracle's log in A and a model's in B."""
    write_log(tmp_path / "A" / "log.json", math.log(4), [math.log(2), math.log(2)])
    write_log(tmp_path / "B" / "log.json", math.log(2), [math.log(4), math.log(8)])
    return tmp_path


ARGS = (
    *("retain_result=A/log.json", "ckpt_result=B/log.json", "method_name=grad_diff", "submitted_by=me"),
    "save_file=out/row.csv",
)


def aggregate(launch, folder, *changed: str, check: bool = True):
    return launch("aggregate_eval_stat.py", *ARGS, *changed, cwd=folder, check=check)


def test_by_hand(launch, two_logs):
    """P = 1/2 against 1/4 and 1/8: R = 2 / sqrt(32). With two rows a side, wholly apart, p = 2 / C(4, 2) = 1/3."""
    said = aggregate(launch, two_logs).stdout
    (row,) = csv.DictReader((two_logs / "out" / "row.csv").open(newline=""))
    assert tuple(row) == tofu_metrics.COLUMNS and (row["Method"], row["Submitted By"]) == ("grad_diff", "me")
    ratio = 2 / math.sqrt(32)
    expected = {f"ROUGE {name}": 0.5 for name in logs.TASKS}
    expected |= {"Prob. Retain": 0.5, "Prob. Forget": 0.5, "Prob. Real World": 4 / 7, "Prob. Real Authors": 4 / 7}
    expected |= {f"Truth Ratio {name}": 1 - ratio for name in logs.TASKS} | {"Truth Ratio Forget": ratio}
    nine = [value for name, value in expected.items() if not name.endswith("Forget")]
    expected |= {"Model Utility": 9 / sum(1 / x for x in nine), "Forget Quality": 1 / 3}
    for name, value in expected.items():
        assert float(row[name]) == pytest.approx(value, rel=1e-12), name
    for name in tofu_metrics.COLUMNS:
        assert name in said
    assert "0.333333" in said and "appended" not in said
    assert {path.name for path in two_logs.iterdir()} == {"A", "B", "out"}
    assert [path.name for path in (two_logs / "out").iterdir()] == ["row.csv"]

    said = aggregate(launch, two_logs, "retain_result=B/log.json").stdout  # the model against itself: one row more
    first, second = csv.DictReader((two_logs / "out" / "row.csv").open(newline=""))
    assert "appended to out/row.csv" in said and first == row and float(second["Forget Quality"]) == 1


def test_over_the_old_file_only_when_told(run_script, monkeypatch, two_logs):
    monkeypatch.chdir(two_logs)
    for _ in range(2):
        run_script("aggregate_eval_stat.py", *ARGS, "overwrite=true")
    assert len((two_logs / "out" / "row.csv").read_text().splitlines()) == 2


BAD = {
    "key": (["submitted_by=null"], ["submitted_by is missing"]),
    "file": (["ckpt_result=C/log.json"], ["ckpt_result=C/log.json", "no such file"]),
    "truncated": (["ckpt_result=cut.json"], ["ckpt_result=cut.json", "not whole JSON"]),
    "other": (["ckpt_result=other.json"], ["ckpt_result=other.json", "neither eval_log_forget.json", "but loss"]),
    "list": (["retain_result=list.json"], ["retain_result=list.json", "not an aggregated log"]),
    "empty": (["ckpt_result=empty.json"], ["an empty log"]),
    "rows": (["retain_result=three.json"], ["different rows (2 and 3)", "ds_size=null"]),
    "folder": (["save_file=A"], ["save_file=A is a folder"]),
    "notes": (["save_file=notes.csv"], ["save_file=notes.csv exists and is no leaderboard CSV", "overwrite=true"]),
    "itself": (["save_file=A/../B/log.json"], ["is one of the two logs"]),
}


@pytest.mark.parametrize(("changed", "said"), BAD.values(), ids=BAD)
def test_bad_input_is_told_in_one_line(capsys, run_script, monkeypatch, two_logs, changed, said):
    (two_logs / "cut.json").write_text((two_logs / "A" / "log.json").read_text()[:-9])
    (two_logs / "other.json").write_text(json.dumps({"loss": {"0": 1.0}}))
    (two_logs / "list.json").write_text("[1, 2]")
    (two_logs / "empty.json").write_text("{}")
    (two_logs / "notes.csv").write_text("mine,1\n")
    write_log(two_logs / "three.json", 1.0, [2.0], rows=3)
    before = {path: path.read_bytes() for path in two_logs.rglob("*") if path.is_file()}
    monkeypatch.chdir(two_logs)
    with pytest.raises(SystemExit, match="2"):
        run_script("aggregate_eval_stat.py", *ARGS, *changed)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert line.startswith("error: ")
    assert all(word in line for word in said), line
    assert {path: path.read_bytes() for path in two_logs.rglob("*") if path.is_file()} == before


def test_metrics_beside_the_log_are_told_and_the_csv_is_the_same(run_script, two_logs, monkeypatch, capsys):
    """Of metrics.json beside ckpt_result, of a TOFU_EVAL.json there, else an empty field; never of retain_result's."""
    monkeypatch.chdir(two_logs)

    def told() -> dict[str, str]:
        capsys.readouterr()
        run_script("aggregate_eval_stat.py", *ARGS, "overwrite=true")
        lines = [line.split(" ", 1)[1] for line in capsys.readouterr().out.splitlines() if " " in line]
        return {line[:26].strip(): line[26:].strip() for line in lines}

    (two_logs / "A" / "metrics.json").write_text('{"Extraction Strength Forget": {"value": 0.75}}')
    plain = told()
    csv_bytes = (two_logs / "out" / "row.csv").read_bytes()
    names = ("Extraction Strength Forget", "Exact Memorisation Forget", "MIA loss", "MIA gradient norm", "PrivLeak")
    assert [plain[name] for name in names] == [""] * 5
    theirs = {
        "mia_loss": {"agg_value": 0.5},
        "privleak": {"agg_value": -12.0},
        "exact_memorization": {"agg_value": 0.1},
    }
    (two_logs / "B" / "TOFU_EVAL.json").write_text(json.dumps({**theirs, "mia_zlib": {"agg_value": None}}))
    assert [told()[name] for name in names] == ["", "0.1", "0.5", "", "-12"]
    ours = {"Exact Memorisation Forget": {"value": 0.25, "interval": [0.2, 0.3]}, "PrivLeak": {"value": None}}
    (two_logs / "B" / "metrics.json").write_text(json.dumps(ours))
    between = told()
    assert between["Exact Memorisation Forget"] == "0.25  (95 % interval 0.2 to 0.3)"
    assert (between["MIA loss"], between["PrivLeak"]) == ("0.5", "")
    assert (two_logs / "out" / "row.csv").read_bytes() == csv_bytes
    (two_logs / "B" / "metrics.json").write_text('{"a')
    with pytest.raises(SystemExit, match="2"):
        told()
    assert "ckpt_result" in capsys.readouterr().err
