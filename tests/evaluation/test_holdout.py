"""The non-members: which rows they are, when there are none, and what is said of them."""

import functools
import json

import pytest
from helpers import MINI, SHARED, checked, needs_shared, read_table, write_table
from omegaconf import DictConfig

from tofu.evaluation import holdout, sets
from tofu.evaluation.metrics import privacy
from tofu.runtime import trained_on
from tofu.runtime.trained_on import NOTHING, UNKNOWN, Taught

QUESTIONS = [row["question"] for row in read_table("holdout10")]


@functools.cache
def composed(*overrides: str) -> DictConfig:
    return checked("eval_everything", "model_path=o/m", *overrides)


def asked(*overrides: str, taught: Taught = NOTHING, data=MINI) -> holdout.Holdout:
    """The non-members of an evaluation on data/mini."""
    cfg = composed(f"data_path={data}", *overrides)
    return holdout.load(cfg, sets.load_sets(cfg), taught)


def test_auto_is_the_set_of_the_forget_split():
    for split, rows in (("forget10", 40), ("forget05_perturbed", 20), ("forget01", 4)):
        found = asked(f"split={split}")
        assert found.data.rows == [
            {"question": row["question"], "answer": row["answer"]} for row in read_table(f"holdout{split[6:8]}")
        ]
        assert len(found.data.rows) == rows and found.about["holdout"] == f"holdout{split[6:8]}"
        assert "note" not in found.about and found.why_not is None
    assert [holdout.of_split(split) for split in ("forget10", "mine", "forget10_x")] == ["holdout10", None, None]


def test_rows_are_cut_as_the_members_are():
    some, all_rows = asked("ds_size=7"), asked("ds_size=null")
    assert (len(some.data.rows), len(all_rows.data.rows)) == (7, 40)
    assert some.about["rows"] != all_rows.about["rows"]
    assert some.about["rows"] == asked("ds_size=7", "holdout.split=holdout10").about["rows"]


def test_without_a_set_there_is_a_reason(tmp_path):
    four = [f"{name}_perturbed" for name in ("retain", "real_authors", "world_facts", "forget10")]
    lacking = asked("split=forget10", data=write_table(tmp_path / "no", **{name: read_table(name) for name in four}))
    assert lacking.data is None and "holdout10 is not in" in lacking.why_not
    named = asked("split_list=[retain_perturbed,real_authors_perturbed,world_facts_perturbed,full]")
    assert named.data is None and "belongs to full is not known" in named.why_not
    alone = asked("split_list=[retain_perturbed]", "eval_task=[eval_log]", "base_answer_key=[paraphrased_answer]")
    assert alone.data is None and "eval_log_forget" in alone.why_not


def test_what_the_model_was_trained_on(caplog):
    """auto leaves such rows out with a reason; a name is taken and marked; what is not known is said."""
    known = trained_on.joined(NOTHING, [f" {QUESTIONS[3]}\n", "Another?"])
    skipped = asked(taught=known)
    assert skipped.data is None and "trained on 1 of the 40 questions of holdout10" in skipped.why_not
    assert asked("ds_size=3", taught=trained_on.joined(NOTHING, QUESTIONS[3:])).data is not None
    taken = asked("holdout.split=holdout10", taught=known)
    assert len(taken.data.rows) == 40 and taken.about["note"] == "non-members were trained on"
    assert asked(taught=UNKNOWN).about["note"] == "whether non-members were trained on is not known"
    assert asked(taught=Taught(known.questions, False)).data is None


def test_the_record_of_a_run(tmp_path, caplog):
    taught = trained_on.joined(Taught(frozenset(["0" * 16]), False), QUESTIONS[:2])
    trained_on.write(tmp_path, taught)
    assert trained_on.read(tmp_path) == taught and len(taught.questions) == 3
    assert trained_on.read(tmp_path / "none") == UNKNOWN and trained_on.read("owner/model", NOTHING) == NOTHING
    (tmp_path / trained_on.FILE).write_text("{")
    assert trained_on.read(tmp_path) == UNKNOWN and "is not whole" in caplog.text


def held(folder, name: str = "metrics.json") -> dict:
    return json.loads((folder / name).read_text())


def test_an_evaluation_with_attacks(evaluated, model_folder):
    """All attacks, the model as its own reference model: that attack tells nothing, and its pass is kept and used."""
    only = ["split_list=[forget10_perturbed]", "eval_task=[eval_log_forget]", "base_answer_key=[paraphrased_answer]"]
    only += ["generation.max_new_tokens=1", "ds_size=6", "metrics=[privacy,mia_gradient_norm]"]
    folder = evaluated(*only, f"reference_model={model_folder}")
    found, rows = held(folder), held(folder, "metric_rows.json")
    for attack in privacy.ATTACKS:
        assert (found[attack]["members"], found[attack]["non_members"], found[attack]["n"]) == (6, 6, 12)
        for task, of in (("eval_log_forget", "Forget"), ("holdout", "Holdout")):
            assert len(rows[task]["rows"][f"{attack} {of}"]) == 6
    assert found["MIA reference"]["value"] == 0.5 and rows["holdout"]["rows"]["MIA reference Holdout"] == [0.0] * 6
    log = held(folder, "eval_log_forget.json")["avg_gt_loss"]
    assert rows["eval_log_forget"]["rows"]["MIA loss Forget"] == list(log.values())
    assert found["PrivLeak"]["reason"] == "it needs retain_result" and not (folder / "holdout.json").exists()
    # against itself as the retain model, whose metrics lie beside the log: s is 1, and PrivLeak 0
    only += [f"retain_result={folder}/eval_log_forget.json"]
    against = held(evaluated(*only, f"reference_model={model_folder}", save_dir="b"))
    assert {against[f"{attack} s"]["value"] for attack in privacy.ATTACKS} == {1.0}
    assert against["PrivLeak"]["value"] == 0
    other = held(evaluated(*only, "holdout.split=full", "metrics=mia_loss", save_dir="c"))
    assert "retain_result's MIA loss is of other rows" in other["MIA loss s"]["reason"]


def test_a_reference_model_that_is_lacking_is_said(evaluated):
    only = ["split_list=[forget10_perturbed]", "eval_task=[eval_log_forget]", "base_answer_key=[paraphrased_answer]"]
    found = held(evaluated(*only, "generation.max_new_tokens=1", "metrics=mia_reference"))
    assert found["MIA reference"]["reason"] == "it needs reference_model"


def golden(name: str = "tiny-llama") -> dict:
    file = SHARED / "golden" / "logs" / name / "openunlearning" / "TOFU_EVAL.json"
    return json.loads(file.read_text())


WHOLE = pytest.param(None, marks=pytest.mark.slow)


@needs_shared
@pytest.mark.parametrize("ds_size", [3, WHOLE])
def test_attacks_are_openunlearnings(run_script, tmp_path, ds_size):
    """Row by row to 1e-5, and over all rows the AUCs and PrivLeak: its hold-out set was retain_perturbed."""
    models, size = SHARED / "golden" / "models", "null" if ds_size is None else ds_size
    retain = SHARED / "golden" / "logs" / "tiny-llama-retain90" / "openunlearning" / "TOFU_EVAL.json"
    run_script(
        *("evaluate_util.py", "model_family=llama2-7b", f"data_path={SHARED / 'tofu'}", f"ds_size={size}"),
        *(f"model_path={models / 'tiny-llama'}", f"reference_model={models / 'tiny-llama-retain90'}"),
        *("split_list=[forget10_perturbed]", "eval_task=[eval_log_forget]", "base_answer_key=[answer]"),
        *("generation.max_length=500", "generation.max_new_tokens=1", "metrics=[privacy,mia_gradient_norm]"),
        *("holdout.split=retain_perturbed", f"save_dir={tmp_path}/out", "progress=false"),
        *([f"retain_result={retain}"] if ds_size is None else []),
    )
    found, rows, theirs = held(tmp_path / "out"), held(tmp_path / "out", "metric_rows.json"), golden()
    for name, attack in privacy.THEIRS.items():
        for side, task in (("forget", "eval_log_forget"), ("holdout", "holdout")):
            ours = rows[task]["rows"][f"{attack} {side.capitalize()}"]
            expected = [theirs[name][side]["value_by_index"][str(i)]["score"] for i in range(ds_size or 400)]
            assert ours == pytest.approx(expected, abs=1e-5), (name, side)
        if ds_size is None:
            assert found[attack]["value"] == pytest.approx(theirs[name]["auc"], abs=1e-4) and found[attack]["n"] == 800
    if ds_size is None:
        assert found["PrivLeak"]["value"] == pytest.approx(theirs["privleak"]["agg_value"], abs=1e-3)
        assert found["MIA loss"]["note"] == "whether non-members were trained on is not known"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "words"), [(2, ("engine=ddp",)), (3, ("engine=ddp",)), (2, ("engine=deepspeed",))], ids=str
)
def test_attacks_do_not_depend_on_the_processes(launch, model_folder, tmp_path, processes, words):
    """The same bytes; under ZeRO-3, which shards the model, the same numbers, and no gradient norms, with a reason."""
    common = ["model_family=tiny", f"data_path={MINI}", f"model_path={model_folder}", f"reference_model={model_folder}"]
    common += ["split_list=[forget10_perturbed]", "eval_task=[eval_log_forget]", "base_answer_key=[answer]"]
    common += ["ds_size=7", "generation.max_new_tokens=1", "metrics=[privacy,mia_gradient_norm]"]
    launch("evaluate_util.py", *common, "save_dir=one", "engine=ddp", cwd=tmp_path)
    launch("evaluate_util.py", *common, "save_dir=more", *words, processes=processes, cwd=tmp_path)
    one, more = (held(tmp_path / name) for name in ("one", "more"))
    if "engine=ddp" in words:
        for name in ("metrics.json", "metric_rows.json", "reference_losses.json"):
            assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "more" / name).read_bytes(), name
        return
    assert "engine=ddp" in more["MIA gradient norm"]["reason"] and one["MIA gradient norm"]["value"] is not None
    for attack in privacy.ATTACKS:
        for of, task in (("Forget", "eval_log_forget"), ("Holdout", "holdout")) if "gradient" not in attack else ():
            name = f"{attack} {of}"
            ours, theirs = (held(tmp_path / x, "metric_rows.json")[task]["rows"][name] for x in ("one", "more"))
            assert theirs == pytest.approx(ours, abs=1e-5), name
