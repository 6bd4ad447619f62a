"""Two evaluations side by side: scripts/compare.py."""

import csv
import json

import pytest

from tofu.reporting import side_by_side

FIRST = {
    "Mem": {"value": 0.5, "n": 40, "interval": [0.4, 0.6], "direction": "max"},
    "Extraction Strength Forget": {"value": 0.25, "n": 40, "interval": None, "direction": "min"},
    "PrivLeak": {"value": -30.0, "n": 80, "interval": None, "direction": "zero"},
    "MIA loss": {"value": 0.9, "n": 80, "interval": None, "direction": "retain"},
    "Agg": {"value": None, "n": None, "interval": None, "direction": "max", "reason": "it needs start_result"},
}
SECOND = {
    **FIRST,
    "Mem": {"value": 0.75, "n": 40, "interval": [0.7, 0.8], "direction": "max"},
    "PrivLeak": {"value": 20.0, "n": 40, "interval": None, "direction": "zero"},
    "More": {"value": 1.0, "n": 4, "interval": None, "direction": "max"},
}


def test_pairs():
    """The better one by direction; nothing where one has no number or the direction is no order."""
    found = {one.metric: (one.difference, one.better) for one in side_by_side.pairs(FIRST, SECOND)}
    assert found == {
        "Mem": (0.25, "B"),
        "Extraction Strength Forget": (0.0, "="),
        "PrivLeak": (50.0, "B"),
        "MIA loss": (0.0, ""),
        "Agg": (None, ""),
        "More": (None, ""),
    }
    assert [one.better for one in side_by_side.pairs({"x": {"value": 1, "direction": "min"}}, {"x": {"value": 2}})] == [
        "A"
    ]


@pytest.fixture
def compare(run_script, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(side_by_side.__file__).partition("/tofu/")[0] + "/scripts")
    for name, metrics in (("a", FIRST), ("b", SECOND)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text(json.dumps(metrics))
    (tmp_path / "none").mkdir()
    (tmp_path / "log.json").write_text('{"eval_log.json": {}}')
    return lambda *args: run_script("compare.py", *args)


def test_the_command(compare, capsys, tmp_path):
    """A folder and a file; the table on stdout, the same numbers in the CSV."""
    compare("results=[a,b/metrics.json]", "save_file=out.csv")
    lines = capsys.readouterr().out.splitlines()[1:]  # after the log's line
    assert lines[:2] == ["A = a", "B = b/metrics.json"]
    assert lines[3].split() == ["Mem", "0.5", "0.75", "+0.25", "B", "max", "0.4", "to", "0.6", "0.7", "to", "0.8", "40"]
    assert lines[5].split() == ["PrivLeak", "-30", "20", "+50", "B", "zero", "80", "/", "40"]
    assert lines[7].split() == ["Agg", "-", "-", "-", "max"]
    assert lines[9:] == [f"{label} has no Agg: it needs start_result" for label in "AB"]
    rows = list(csv.DictReader((tmp_path / "out.csv").open()))
    assert [row["metric"] for row in rows] == [*FIRST, "More"]
    assert (rows[0]["difference"], rows[0]["low_b"], rows[4]["a"], rows[5]["b"]) == ("0.25", "0.7", "", "1.0")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["results=[a]"], "a list of two evaluations, results=[A,B]"),
        (["results=a"], "a list of two evaluations"),
        ([], "results is missing: give results=..."),
        (["results=[a,none]"], "results=none/metrics.json: no such file"),
        (["results=[a,log.json]"], "log.json is no metrics.json"),
        (["results=[a,b]", "save_file=none"], "is a folder"),
        (["result=[a,b]"], "result is no key of compare.yaml (did you mean results?)"),
    ],
)
def test_what_it_refuses(compare, capsys, args, said):
    with pytest.raises(SystemExit, match="2"):
        compare(*args)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert said in line
