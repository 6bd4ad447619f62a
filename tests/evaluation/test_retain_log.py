"""A retain model that was asked with other tags: known by the family beside its log, else by the log's prompts."""

import json

import pytest
from helpers import SHARED, checked, needs_shared

from tofu.evaluation import logs, retain_log, sets
from tofu.models import families, folders
from utils import BadInput


@pytest.fixture
def retain(evaluated):
    """The log of an evaluation with the family tiny."""
    return evaluated(save_dir="retain") / logs.AGGREGATED


def test_by_the_family_beside_it(evaluated, retain, capsys):
    assert (evaluated(f"retain_result={retain}") / "aggregate_stat.csv").is_file()
    with pytest.raises(SystemExit, match="2"):
        evaluated("model_family=phi", f"retain_result={retain}", save_dir="other")
    assert (
        f"retain_result={retain} was made with model_family=tiny, with another answer_tag, '' instead of 'Answer: '"
        in capsys.readouterr().err
    )
    assert not (retain.parents[1] / "other").exists()


def test_by_its_prompts(evaluated, retain, capsys):
    (retain.parent / "finished.json").unlink()
    assert (evaluated(f"retain_result={retain}") / "aggregate_stat.csv").is_file()
    with pytest.raises(SystemExit, match="2"):
        evaluated("model_family=llama2-7b", f"retain_result={retain}", save_dir="other")
    assert (
        "the retain model was asked with other tags (4 of 4 prompts differ): 'Question:What" in capsys.readouterr().err
    )


def test_special_tokens_and_white_space_do_not_count(evaluated, retain):
    (retain.parent / "finished.json").unlink()
    log = json.loads(retain.read_text())
    for row in log["eval_log_forget.json"]["generated_text"].values():
        row[0] = f"<s> {row[0].strip()}  </s>"
    retain.write_text(json.dumps(log))
    assert (evaluated(f"retain_result={retain}") / "aggregate_stat.csv").is_file()


def test_without_prompts_one_warning(evaluated, retain, capsys):
    (retain.parent / "finished.json").unlink()
    log = json.loads(retain.read_text())
    for one in log.values():
        one.pop("generated_text")
    retain.write_text(json.dumps(log))
    evaluated(f"retain_result={retain}")
    assert capsys.readouterr().out.count("has neither prompts nor a family beside it") == 1


@needs_shared
@pytest.mark.parametrize(
    ("log", "split"),
    [
        ("logs/tiny-llama-retain90/eval_log_aggregated.json", "forget10"),
        ("real_logs/llama2-7b_retain90.json", "forget10"),
        ("real_logs/llama2-7b_retain99.json", "forget01"),
    ],
)
def test_logs_of_the_original_are_accepted(log, split):
    path = SHARED / "golden" / log
    rows = len(json.loads(path.read_text())["eval_log_forget.json"][logs.RIGHT])
    cfg = checked(
        *("eval_everything", "model_family=llama2-7b", "model_path=o/m", f"data_path={SHARED / 'tofu'}"),
        *(f"split={split}", f"ds_size={rows}", f"retain_result={path}"),
    )
    family, tokenizer = (
        families.family("llama2-7b"),
        folders.load_tokenizer(str(SHARED / "golden/models/tiny-llama"), None),
    )
    record = families.record("llama2-7b", family, tokenizer.eos_token)
    forget = sets.load_sets(cfg)[-1]
    assert retain_log.load_retain_log(cfg, [sets.prepare(forget, tokenizer, family, max_length=200)], record, tokenizer)
    phi = families.family("phi")
    with pytest.raises(BadInput, match="asked with other tags"):
        asked = sets.prepare(forget, tokenizer, phi, max_length=200)
        retain_log.load_retain_log(cfg, [asked], families.record("phi", phi, ""), tokenizer)


def test_without_prompts_other_lengths_are_refused_before_the_evaluation(evaluated, retain, capsys):
    """A tag may join with an answer's first token, so that other tags are other counts."""
    (retain.parent / "finished.json").unlink()
    log = json.loads(retain.read_text())
    for one in log.values():
        one.pop("generated_text")
    retain.write_text(json.dumps(log))
    with pytest.raises(SystemExit, match="2"):
        evaluated("model_family=llama2-7b", f"retain_result={retain}", save_dir="other")
    assert "answers have other lengths" in capsys.readouterr().err and not (retain.parents[1] / "other").exists()
