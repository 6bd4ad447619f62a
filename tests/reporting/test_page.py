"""The page on which a person looks at an evaluation."""

import datetime
import json

from tofu.evaluation import evaluator, logs


def test_report_shows_scores_intervals_and_rows(evaluated):
    """The page has each score with its interval, and of 12 rows the five best and the five worst, with their texts."""
    retain = evaluated("ds_size=12", save_dir="retain") / logs.AGGREGATED
    folder = evaluated("ds_size=12", f"retain_result={retain}")
    text, scores = (folder / evaluator.REPORT).read_text(), json.loads((folder / "finished.json").read_text())
    assert "| Forget Quality | 1 | 1 to 1 |" in text and "12 rows a side" in text
    low, high = scores["Confidence Intervals"]["Prob. Retain"]
    assert f"| Prob. Retain | {scores['Prob. Retain']:.4g} | {low:.4g} to {high:.4g} |" in text
    assert low < scores["Prob. Retain"] < high
    head = text.splitlines()
    assert head[2].startswith("- model: ") and head[3:6] == [
        "- split: forget10\\_perturbed",
        "- family: tiny",
        "- ds_size: 12",
    ]
    assert head[6] == f"- date: {datetime.date.today().isoformat()}" and "| -0 |" not in text
    assert "| min(R, 1 / R) |" in text and text.count("| max(0, 1 - R) |") == 6 and "Truth ratio R: exp(" in text
    section = text.split("## Forget: `eval_log_forget.json`")[1]
    shown = [line.split(" | ")[0].strip("| ") for line in section.splitlines() if line[:3].strip("| ").isdigit()]
    assert len(shown) == len(set(shown)) == 10
