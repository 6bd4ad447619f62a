"""scripts/table.py: a line a run, or one line that says what is missing."""

import importlib.util
import json
import shutil

import pytest
from helpers import REPO

SPEC = importlib.util.spec_from_file_location("table", REPO / "scripts" / "table.py")
table = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(table)


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good").mkdir()
    scores = {"Model Utility": 0.5, "Forget Quality": 0.0001, "ROUGE Forget": 0.25}
    (tmp_path / "good" / "finished.json").write_text(json.dumps(scores))
    (tmp_path / "trained").mkdir()
    (tmp_path / "trained" / "finished.json").write_text('{"train_loss": 1.0}')
    (tmp_path / "none").mkdir()

    def go(*args):
        monkeypatch.setattr("sys.argv", ["table.py", *args])
        table.main()
        return capsys.readouterr().out

    return go


def test_a_line_a_run(run):
    assert run("mine=good").splitlines()[1].split() == ["mine", "0.5000", "1.00e-04", "0.2500"]


def test_more_columns_where_a_run_has_them(run, tmp_path):
    shutil.copytree(tmp_path / "good", tmp_path / "measured")
    measured = {"Extraction Strength Forget": {"value": 0.125}, "Agg (ngrams)": {"value": 4e-12}}
    (tmp_path / "measured" / "metrics.json").write_text(json.dumps(measured))
    lines = [line.split() for line in run("mine=good", "other=measured").splitlines()]
    assert [line[-2:] for line in lines] == [["extraction", "Agg"], ["-", "-"], ["0.1250", "4.00e-12"]]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["none"], "none: no finished evaluation there (no finished.json)"),
        (["x=trained"], "trained: no finished evaluation there (its finished.json has no Model Utility"),
        (["--only", "Method", "good"], "good: no aggregate_stat.csv there"),
        ([], "NAME=RUN"),
        (["--only", "Method"], "--only COLUMN FOLDER"),
    ],
)
def test_what_is_missing_is_one_line(run, args, said):
    with pytest.raises(SystemExit) as end:
        run(*args)
    assert str(end.value.code).startswith("error: ") and said in end.value.code
