"""The embedded data: TOFU's splits and columns, reproducible, and perturbed in the fact alone."""

import importlib.util

import datasets
import pytest
from helpers import MINI, REPO, read_table


def script(name):
    spec = importlib.util.spec_from_file_location(name, REPO / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_mini = script("make_mini")


def test_generator_gives_the_committed_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["make_mini.py", str(tmp_path)])
    make_mini.main()
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in MINI.iterdir()}
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (MINI / path.name).read_bytes(), path.name


@pytest.mark.parametrize(("percent", "rows"), [("01", 4), ("05", 20), ("10", 40)])
def test_forget_and_retain_make_full(percent, rows):
    forget, retain = read_table(f"forget{percent}"), read_table(f"retain{100 - int(percent)}")
    assert retain + forget == read_table("full") and len(forget) == rows
    assert [
        {"question": r["question"], "answer": r["answer"]} for r in read_table(f"forget{percent}_perturbed")
    ] == forget
    assert len(read_table(f"holdout{percent}")) == rows


def test_questions_are_different_and_holdout_authors_are_not_in_full():
    full = read_table("full")
    assert len({row["question"] for row in full}) == len(full) == 400
    assert not {row["question"] for row in full} & {row["question"] for row in read_table("holdout10")}


@pytest.mark.parametrize("split", ["forget10_perturbed", "retain_perturbed", "holdout10_perturbed"])
def test_a_perturbed_answer_changes_the_fact_alone(split):
    for row in read_table(split):
        assert len({*row["perturbed_answer"], row["paraphrased_answer"]}) == 6
        assert row["answer"] != row["paraphrased_answer"] and row["question"] != row["paraphrased_question"]
        right = row["paraphrased_answer"].split()
        for wrong in row["perturbed_answer"]:
            start = next(i for i, (a, b) in enumerate(zip(right, wrong.split(), strict=False)) if a != b)
            end = next(i for i, (a, b) in enumerate(zip(right[::-1], wrong.split()[::-1], strict=False)) if a != b)
            assert start + end >= 3, (right, wrong)


@pytest.mark.parametrize("split", ["real_authors_perturbed", "world_facts_perturbed"])
def test_options(split):
    rows = read_table(split)
    assert len(rows) == 40
    assert all(len({*row["perturbed_answer"], row["answer"]}) == 4 for row in rows)


def test_every_split_loads_by_name(tmp_path):
    names = datasets.get_dataset_config_names(str(MINI))
    assert len(names) == 21
    for name in names:  # a cache of its own: the shared one answers for any other folder called mini
        table = datasets.load_dataset(str(MINI), name, split="train", cache_dir=str(tmp_path))
        assert table.to_list() == read_table(name), name


def test_refusals_are_a_hundred():
    lines = (REPO / "data" / "idontknow.jsonl").read_text().splitlines()
    assert len(set(lines)) == 100 and all(line.strip() for line in lines)


def test_the_tiny_model_meets_nobody_of_full_or_holdout_before():
    met = {row["question"] for row in script("make_tiny").pretraining_rows()}
    for split in ("full", "holdout10"):
        rows = read_table(split)
        assert met.isdisjoint(row["question"] for row in rows if "born in" not in row["question"])
        names = {row["question"].removeprefix("In which city was ").removesuffix(" born?") for row in rows[1::20]}
        assert len(names) == len(rows) // 20
        assert not any(name in question for name in names for question in met)
