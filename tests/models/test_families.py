"""Which family a model belongs to: the recorded one, its own, or a refusal; and tags that must agree."""

import json
import logging

import pytest
from helpers import MINI, checked, read_table
from omegaconf import OmegaConf

from tofu.models import families, folders
from tofu.runtime import trained_on
from utils import BadInput

TINY = {"system_prompt": "", "question_start_tag": "Question: ", "question_end_tag": "\n", "answer_tag": ""}


def recorded(folder, **changed):
    """A model's folder with a record of the family `tiny`, or of one with other tags."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    record = {"model_family": "tiny", **TINY, "end_token": "</s>", **changed}
    (folder / families.RECORD).write_text(json.dumps(record))
    return folder


class TestOfModel:
    def test_the_record_tells_it(self, tmp_path):
        assert families.of_model(str(recorded(tmp_path / "run", model_family="phi"))) == "phi"

    def test_an_adapter_has_its_bases(self, tmp_path):
        base = recorded(tmp_path / "base", model_family="phi")
        (tmp_path / "adapter").mkdir()
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
        assert families.of_model(str(tmp_path / "adapter")) == "phi"

    @pytest.mark.parametrize(
        ("path", "name"),
        [
            ("locuslab/tofu_ft_phi-1.5", "phi"),
            ("open-unlearning/tofu_Llama-3.2-3B-Instruct_full", "ou-llama3.2-3b"),
            ("NousResearch/Llama-2-7b-chat-hf", "llama2-7b"),
        ],
    )
    def test_a_familys_own_models(self, path, name):
        assert families.of_model(path) == name

    @pytest.mark.parametrize(
        ("path", "said"),
        [
            ("meta-llama/Llama-3.2-1B-Instruct", "hf_key of llama3.2-1b and ou-llama3.2-1b, whose tags differ"),
            ("owner/model", "model_path=owner/model (there is no such folder; it is taken as a hub id) does not tell"),
            ("gpt2", "model_path=gpt2: no such folder, and no hub id"),
            (None, "model_family is missing: give model_family=..., one of tiny, llama2-7b"),
        ],
    )
    def test_refusals(self, path, said):
        with pytest.raises(BadInput) as error:
            families.of_model(path)
        assert said in str(error.value)

    def test_a_family_that_is_no_entry_any_more(self, tmp_path):
        with pytest.raises(BadInput, match="was trained as model_family=mine, which is no entry"):
            families.of_model(str(recorded(tmp_path, model_family="mine")))

    @pytest.mark.parametrize("text", ["[]", "{}", '{"model_family": "tiny"}', "{"])
    def test_a_broken_record(self, tmp_path, text):
        (recorded(tmp_path) / families.RECORD).write_text(text)
        with pytest.raises(BadInput):
            families.of_model(str(tmp_path))

    @pytest.mark.parametrize("name", ["forget", "eval_everything"])
    def test_it_is_known_before_a_folders_name_is_made(self, tmp_path, name):
        run = recorded(tmp_path / "run")
        cfg = checked(name, "model_family=null", f"model_path={run}", f"data_path={MINI}", "split=forget10")
        assert cfg.model_family == "tiny" and cfg.save_dir.startswith(str(run))
        assert cfg.get("eval", cfg).model_family == "tiny"


def ours(name="tiny", end_token="</s>", **changed):
    found = families.family(name)
    return {**families.record(name, found, end_token), **changed}


class TestAgreement:
    def test_another_name_with_equal_tags(self, tmp_path, caplog):
        families.check_agrees(str(recorded(tmp_path, model_family="other")), ours(), own=False)
        assert not caplog.records

    @pytest.mark.parametrize(
        ("made", "said"),
        [
            ({"question_end_tag": " [/INST]"}, "question_end_tag, ' [/INST]' instead of '\\n'"),
            ({"end_token": "<|eot_id|>"}, "end_token, '<|eot_id|>' instead of '</s>'"),
            ({"system_prompt": "Be short."}, "system_prompt, 'Be short.' instead of ''"),
        ],
    )
    def test_other_tags_are_refused(self, tmp_path, made, said):
        with pytest.raises(BadInput) as error:
            families.check_agrees(str(recorded(tmp_path, model_family="theirs", **made)), ours(), own=True)
        assert "model_family=tiny:" in str(error.value) and f"trained as theirs, with another {said}" in str(
            error.value
        )

    @pytest.mark.parametrize(("own", "warned"), [(False, 1), (True, 0)])
    def test_without_a_record_one_warning(self, tmp_path, caplog, own, warned):
        with caplog.at_level(logging.WARNING):
            families.check_agrees(str(tmp_path), ours(), own=own)
        assert [r.message for r in caplog.records] == [
            f"{tmp_path} does not say with which tags it was trained (no {families.RECORD}): those of tiny are taken"
        ] * warned


def test_a_run_records_it_and_others_are_refused(run_script, model_folder, tmp_path, monkeypatch, capsys):
    """finetune -> forget -> evaluate without a family; the typed one of other tags is refused before any folder."""
    monkeypatch.setitem(
        families.entries(), "tiny", OmegaConf.merge(families.entries().tiny, {"hf_key": str(model_folder)})
    )
    monkeypatch.chdir(tmp_path)
    data, few = f"data_path={MINI}", ("num_epochs=1", "lr=1e-3", "gradient_accumulation_steps=1")
    run_script("finetune.py", "model_family=tiny", data, "split=retain90", "save_dir=base", *few)
    record = json.loads((tmp_path / "base" / families.RECORD).read_text())
    assert record == {"model_family": "tiny", **TINY, "end_token": "</s>"}
    assert json.loads((tmp_path / "base" / "finished.json").read_text())["family"] == record
    run_script("forget.py", "model_path=base", data, "split=forget10", "save_dir=base/forgot", *few)
    assert json.loads((tmp_path / "base" / "forgot" / families.RECORD).read_text()) == record
    for folder, split in (("base", "retain90"), ("base/forgot", "full")):  # 40 rows to forget, 360 to keep
        taught = trained_on.read(tmp_path / folder)
        assert taught == (frozenset(trained_on.digest(row["question"]) for row in read_table(split)), True)
    chosen = ("ds_size=2", "metrics=mia_loss")
    run_script("evaluate_util.py", "model_path=base/forgot", data, "save_dir=evaluation", *chosen)
    attack = json.loads((tmp_path / "evaluation" / "metrics.json").read_text())["MIA loss"]
    assert (attack["n"], attack["holdout"]) == (4, "holdout10") and "note" not in attack  # it is new to the model
    assert json.loads((tmp_path / "evaluation" / "finished.json").read_text())["family"] == record
    for script in ("forget.py", "evaluate_util.py"):
        with pytest.raises(SystemExit, match="2"):
            run_script(script, "model_path=base", "model_family=llama2-7b", data, "split=forget10", "save_dir=no")
        assert "base was trained as tiny, with another question_start_tag" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_finetuning_may_teach_other_tags(model_folder):
    """A family's own pretrained model may be taught other tags than it has been: finetune.py asks for no agreement."""
    tokenizer, family, record = folders.load_asked(str(model_folder), "phi", "model_family")
    assert family.answer_tag == "Answer: " and record["end_token"] == tokenizer.eos_token == "</s>"
