"""What check() refuses and how it says so, which keys follow which, and the command line around a script."""

import pytest
from helpers import checked
from omegaconf import OmegaConf

import utils
from tofu.cli import schema
from tofu.models import families
from utils import BadInput

EVALUATE = ("eval_everything", "model_path=owner/model")


def refused(name: str, *overrides: str) -> str:
    with pytest.raises(BadInput) as error:
        checked(name, *overrides)
    line = str(error.value)
    assert "\n" not in line and "full_key" not in line, line
    return line


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model_family=phy", "model_family=phy is unknown (did you mean phi?): it may be tiny, "),
        ("engine=deepsped", "engine=deepsped is unknown (did you mean deepspeed?): it may be auto, ddp, "),
        ("precision=fp16", "it may be auto, fp32, bf16"),
        ("engine=fsdp", "start it with torchrun"),
        ("lr=0", "lr=0.0: it must be above 0"),
        ("lr=nan", "lr=nan: it must be above 0"),
        ("lr=fast", "lr=fast: it must be a number"),
        ("lr=null", "lr is missing: it must be a number"),
        ("batch_size=0", "batch_size=0: it must be at least 1"),
        ("batch_size=1.5", "batch_size=1.5: it must be a whole number"),
        ("num_epochs=0", "num_epochs=0: it must be at least 1"),
        ("gradient_accumulation_steps=0", "gradient_accumulation_steps=0"),
        ("logging_steps=0", "logging_steps=0"),
        ("max_length=1", "max_length=1: it must be at least 2"),
        ("weight_decay=-1", "weight_decay=-1.0: it must be at least 0"),
        ("max_grad_norm=-1", "max_grad_norm=-1.0: it must be at least 0"),
        ("seed=-1", "seed=-1: it must be at least 0"),
        ("seed=4294967296", "below 2**32"),
        ("LoRA.r=-1", "LoRA.r=-1: it must be at least 0"),
        ("LoRA.dropout=1", "LoRA.dropout=1.0: it must be below 1"),
        ("LoRA=8", "LoRA=8: it is a group of keys, LoRA.r, LoRA.alpha, LoRA.dropout"),
        ("+LoRA.rank=8", "LoRA.rank is no key"),
        ("data_path=[a,b]", "data_path=['a', 'b']: it must be a text"),
        ("overwrite_dir=maybe", "overwrite_dir=maybe: it must be true or false"),
        ("ds_config=nowhere.json", "ds_config=nowhere.json: no such file"),
        ("+epochs=3", "epochs is no key (did you mean num_epochs?): there are model_family, "),
    ],
)
def test_finetune_and_forget_refuse(override, said):
    for name in ("finetune", "forget"):
        assert said in refused(name, override)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["split=full"], "split=full: forget01, forget05 or forget10; or name the rows to keep too: retain_split=..."),
        (["split=forget10_perturbed"], "split=forget10_perturbed: forget01"),
        (["split=forget00"], "split=forget00"),
        (["model_family=stablelm"], "model_path is missing and stablelm has no ft_model_path"),
        (["forget_loss.forget=npoo"], "forget_loss.forget=npoo is unknown (did you mean "),
        (["forget_loss.retain=grad_ascent"], "forget_loss.retain=grad_ascent is unknown: it may be nll, kl"),
        (["+forget_loss.forget_args.beta=1"], "forget_loss.forget_args=['beta']: grad_ascent takes none"),
        (["forget_loss=dpo", "~forget_loss.forget_args.beta"], "['scale']: dpo takes beta, scale"),
        (["forget_loss=dpo", "forget_loss.forget_args.beta=x"], "forget_args.beta=x: it must be a number"),
        (["forget_loss=dpo", "forget_loss.forget_args.beta=null"], "it must be a number"),
        (["forget_loss.forget_weight=nan"], "forget_loss.forget_weight=nan"),
        (["eval.batch_size=0"], "eval.batch_size=0: it must be auto, or a whole number of at least 1"),
        (["eval.engine=ddp"], "eval.engine=ddp: eval.engine follows engine=auto: set engine"),
        (["eval.precision=fp32"], "eval.precision follows precision=auto: set precision"),
        (["eval.ds_config=config/ds_config_zero2.json"], "eval.ds_config follows ds_config=config/ds_config.json"),
        (["eval.model_path=o/m"], "eval.model_path follows model_path=locuslab/tofu_ft_llama2-7b: set model_path"),
        (["eval.model_family=phi"], "eval.model_family follows model_family=llama2-7b: set model_family"),
        (["eval.save_dir=x"], "eval.save_dir follows save_dir=runs/"),
        (["eval.use_pretrained=true"], "eval.use_pretrained=true: a run evaluates its own model; use_pretrained"),
        (["eval.reinitialize_weights=true"], "reinitialize_weights belongs to evaluate_util.py alone"),
        (["eval.data_path=[a,b]"], "eval.data_path has 2 entries and eval.eval_task 4"),
    ],
)
def test_forget_refuses(overrides, said):
    assert said in refused("forget", *overrides)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("ds_size=0", "ds_size=0: it must be at least 1"),
        ("generation.max_new_tokens=0", "generation.max_new_tokens=0"),
        ("generation.max_length=1", "generation.max_length=1"),
        ("split_list=[a,b]", "split_list has 2 entries and eval_task 4: the lists are parallel"),
        ("eval_task=[a,a,b,c]", "eval_task=['a', 'a', 'b', 'c']: it must name a log for each set, none twice"),
        ("question_key=null", "question_key="),
        ("question_key=[a,b,c,[d]]", "it must be a text, or a list of one for each set"),
        ("model_path=null", "model_path is missing: name the model to evaluate, model_path=..."),
    ],
)
def test_evaluation_refuses(override, said):
    assert said in refused(*EVALUATE, override)


def test_aggregation_names_what_is_missing():
    told = refused("aggregate_eval_stat", "retain_result=x")
    assert "ckpt_result, method_name, submitted_by, save_file are missing: give ckpt_result=..." in told
    assert "ckpt_result is missing" in refused("aggregate_eval_stat", *(f"{key}=x" for key in GIVEN))


GIVEN = ("retain_result", "method_name", "submitted_by", "save_file")


def test_every_missing_key_of_an_aggregation_is_named():
    assert refused("aggregate_eval_stat").startswith(
        "retain_result, ckpt_result, method_name, submitted_by, save_file are"
    )


def test_fsdp_is_taken_with_two_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert checked("finetune", "engine=fsdp").engine == "fsdp"


def test_eval_follows_its_run():
    cfg = checked("forget", "model_family=phi", "model_path=o/m", "split=forget05", "data_path=o/d", "precision=fp32")
    assert (cfg.eval.model_family, cfg.eval.model_path, cfg.eval.precision) == ("phi", "o/m", "fp32")
    assert cfg.eval.save_dir == cfg.save_dir
    assert cfg.eval.split == cfg.eval.split_list[3] == "forget05_perturbed"
    assert list(cfg.eval.data_path) == ["o/d"] * 4
    assert checked("forget", "model_path=o/m", "eval.split=forget10").eval.split_list[3] == "forget10_perturbed"


def test_method_sets_what_the_command_line_does_not():
    cfg = checked("forget", "forget_loss.lr=3e-5", "forget_loss.num_epochs=2")
    assert (cfg.lr, cfg.num_epochs) == (3e-5, 2)
    assert checked("forget", "forget_loss.lr=3e-5", "lr=1e-4").lr == 1e-4


@pytest.mark.parametrize(
    ("split", "retain"), [("forget01", "retain99"), ("forget05", "retain95"), ("forget10", "retain90")]
)
def test_retain_split_completes_the_forget_split(split, retain):
    assert checked("forget", f"split={split}").retain_split == retain
    assert checked("forget", f"split={split}", "retain_split=mine").retain_split == "mine"


def test_own_split_needs_an_own_retain_split():
    assert checked("forget", "split=mine", "retain_split=rest").retain_split == "rest"


def test_one_text_stands_for_a_list_of_equal_ones():
    cfg = checked(*EVALUATE, "data_path=o/d", "perturbed_answer_key=[a,b,c,d]", "split=forget01")
    assert list(cfg.data_path) == ["o/d"] * 4 and list(cfg.question_key) == ["question"] * 4
    assert list(cfg.perturbed_answer_key) == ["a", "b", "c", "d"]
    assert list(cfg.split_list)[3] == "forget01_perturbed"
    single = checked(*EVALUATE, "eval_task=log", "split_list=forget10", "base_answer_key=answer")
    assert list(single.split_list) == ["forget10_perturbed"] and list(single.eval_task) == ["log"]


def test_home_is_the_model_folder_or_runs(tmp_path, monkeypatch):
    """Nothing is ever saved in a folder named like a hub id."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    assert checked("forget").save_dir == "runs/tofu_ft_llama2-7b/grad_ascent_1e-05_forget01_5_seed42"
    assert checked("forget", "model_path=owner/model").save_dir.startswith("runs/model/")
    assert checked("forget", "model_path=mine").save_dir.startswith("mine/")
    assert checked("forget", f"model_path={tmp_path}/mine").save_dir.startswith(f"{tmp_path}/mine/")
    assert checked("eval_everything", "model_path=mine").save_dir == "mine/eval_results/ds_size300"
    assert checked(*EVALUATE, "ds_size=20").save_dir == "runs/model/eval_results/ds_size20"


def test_home_of_what_the_repository_ships(tmp_path, monkeypatch):
    """The repository's own, from any working directory; anything else from the working directory alone."""
    monkeypatch.chdir(tmp_path)
    shipped = utils.REPO / "data" / "mini"
    assert families.home("data/mini", "tiny") == str(shipped)
    (tmp_path / "data" / "mini").mkdir(parents=True)
    assert families.home("data/mini", "tiny") == str(shipped)
    assert families.home("scripts", "tiny") == "scripts"


@pytest.mark.parametrize("how", ["use_pretrained=true", "reinitialize_weights=true"])
def test_what_is_not_the_finetuned_model_is_not_saved_with_it(how):
    cfg = checked("eval_everything", "model_family=phi", how)
    assert cfg.model_path == "microsoft/phi-1_5" and cfg.save_dir == "runs/phi-1_5/eval_results/ds_size300"


def test_pretrained_goes_before_model_path():
    cfg = checked(*EVALUATE, "model_family=phi", "use_pretrained=true")
    assert cfg.model_path == "microsoft/phi-1_5" and cfg.save_dir.startswith("runs/phi-1_5/")


@pytest.mark.parametrize("name", ["2024", "nan"])
def test_a_model_folder_may_be_named_like_a_number(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    cfg = checked("forget", f"model_path={name}")
    assert cfg.save_dir.rpartition("/")[0] == cfg.model_path == cfg.eval.model_path
    assert checked("eval_everything", f"model_path={name}").save_dir.endswith("/eval_results/ds_size300")


def test_the_embedded_model_is_not_made_yet(monkeypatch, tmp_path):
    """A newcomer's first forget.py: what makes the model that it would start from."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(utils, "REPO", tmp_path)
    assert (
        "python finetune.py model_family=tiny data_path=data/mini split=full save_dir=runs/tiny/full lr=..."
    ) in refused("forget", "model_family=tiny", "data_path=data/mini", f"ds_config={schema.CONFIG_DIR}/ds_config.json")
    (tmp_path / "runs/tiny/full").mkdir(parents=True)
    cfg = checked("forget", "model_family=tiny", f"ds_config={schema.CONFIG_DIR}/ds_config.json")
    assert cfg.model_path.endswith("runs/tiny/full")


def test_a_home_folder_is_found_in_where_to_save(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert checked("finetune", 'save_dir="~/x"').save_dir == f"{tmp_path}/x"
    cfg = checked("forget", 'save_dir="~/x"')
    assert cfg.save_dir == cfg.eval.save_dir == f"{tmp_path}/x"
    needed = ("retain_result=x", "ckpt_result=x", "submitted_by=x", "method_name=x")
    assert checked("aggregate_eval_stat", *needed, 'save_file="~/x.csv"').save_file == f"{tmp_path}/x.csv"


def test_families_are_typed(monkeypatch):
    broken = OmegaConf.create({"a": {"hf_key": "o/m"}, "b": {**families.entries()["phi"], "anser_tag": ""}})
    monkeypatch.setattr(families, "entries", lambda: broken)
    with pytest.raises(BadInput, match="a has no answer_tag"):
        families.family("a")
    with pytest.raises(BadInput, match=r"b: anser_tag is no key of a family \(did you mean answer_tag\?"):
        families.family("b")
