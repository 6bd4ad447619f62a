"""What others made is read and never run; no name leads out of its folder; no credential is written down."""

import json
import os
import pickle
import shutil

import pytest
import torch
from helpers import MINI, checked
from omegaconf import OmegaConf
from safetensors.torch import load_file

import utils
from tofu.models import folders, loadable, loading
from tofu.runtime import claim, run_folder, trust
from utils import BadInput

CFG = OmegaConf.create({"lr": 1e-5})


@pytest.fixture(autouse=True)
def afresh():
    yield
    claim.release()
    trust.settle({"verify": "sizes", "allow_pickle": False})


@pytest.fixture
def model(model_folder, tmp_path):
    """A copy of the tiny random model."""
    return shutil.copytree(model_folder, tmp_path / "model")


@pytest.fixture
def pickled(model):
    """Its weights in a pickle, with what the test puts beside them: pickled(marker=Evil(...)) -> its folder."""

    def go(**beside) -> str:
        weights = load_file(model / "model.safetensors")
        (model / "model.safetensors").unlink()
        torch.save({**weights, **beside}, model / "pytorch_model.bin")
        return str(model)

    return go


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


class TestPickles:
    """pytorch_model.bin."""

    def test_tensors_alone_are_read(self, pickled, model_folder):
        path = pickled()
        loadable.check_weights(path)
        whole = load_file(model_folder / "model.safetensors")
        assert all(torch.equal(value, whole[name]) for name, value in loading.load(path).state_dict().items())

    def test_code_is_refused_and_not_run(self, pickled, tmp_path):
        path = pickled(marker=Evil(tmp_path / "ran"))
        said = "the weights of .* are in a file that holds more than tensors .* set allow_pickle=true"
        with pytest.raises(BadInput, match=said) as error:
            loadable.check_weights(path)
        assert "\n" not in str(error.value) and not (tmp_path / "ran").exists()

    def test_with_the_key_it_is_read_whole(self, pickled, tmp_path, model_folder, caplog):
        path = pickled(marker=Evil(tmp_path / "ran"))
        trust.settle({"verify": "sizes", "allow_pickle": True})
        loadable.check_weights(path)
        assert (tmp_path / "ran").is_dir() and "read as pickles, which may run any code" in caplog.text
        (tmp_path / "ran").rmdir()
        read, whole = loading.load(path), loading.load(str(model_folder))
        assert read.name_or_path == path and read.generation_config == whole.generation_config
        assert "left out, since it is no tensor: marker" in caplog.text
        assert all(torch.equal(value, whole.state_dict()[name]) for name, value in read.state_dict().items())

    def test_a_script_refuses_it(self, run_script, pickled, tmp_path, monkeypatch, capsys):
        path = pickled(marker=Evil(tmp_path / "ran"))
        monkeypatch.chdir(tmp_path)
        args = ["model_family=tiny", f"data_path={MINI}", f"model_path={path}", "save_dir=out", "ds_size=2"]
        with pytest.raises(SystemExit, match="2"):
            run_script("evaluate_util.py", *args)
        assert "allow_pickle=true" in capsys.readouterr().err
        assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()

    def test_one_without_tensors(self, model):
        (model / "model.safetensors").unlink()
        (model / "pytorch_model.bin").write_bytes(pickle.dumps(["no", "tensors"]))
        trust.settle({"verify": "sizes", "allow_pickle": True})
        with pytest.raises(BadInput):
            loadable.check_weights(str(model))


OWN_CODE = "import pathlib\npathlib.Path({!r}).mkdir()\nclass Own:\n    pass\n"


@pytest.mark.parametrize("kind", ["llama", "own"])
def test_code_in_a_models_folder_is_never_run(model, tmp_path, kind):
    """One of a known type is read by transformers' own class, whatever its auto_map names; another one is refused."""
    (model / "own.py").write_text(OWN_CODE.format(str(tmp_path / "ran")))
    for name, autos in (
        ("config.json", {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["own.Own", "own.Own"]}),
    ):
        known = json.loads((model / name).read_text())
        known |= {"auto_map": autos, **({"model_type": kind} if name == "config.json" else {})}
        (model / name).write_text(json.dumps(known))
    if kind == "own":
        with pytest.raises(BadInput, match="needs code of its own"):
            folders.config_of(folders.resolve(str(model), "model_path"))
    else:
        path = folders.resolve(str(model), "model_path")
        folders.load_tokenizer(path, None)
        loadable.check_weights(path)
        assert type(loading.load(path)).__module__.startswith("transformers.")
        loading.load(path, random_weights=True)
    assert not (tmp_path / "ran").exists()


class TestPaths:
    """Names from configs, logs and foreign folders."""

    @pytest.mark.parametrize("name", ["../../x", "a/b", "..", "", ".hidden", "a\\b"])
    def test_a_logs_name(self, name):
        tasks = f"eval_task=['{name}',b,c,d]"
        with pytest.raises(BadInput, match="it must name a log for each set"):
            checked("eval_everything", "model_path=o/m", tasks)

    def test_a_log_named_as_the_runs_own_file(self):
        with pytest.raises(BadInput, match=r"writes a versions.json of its own"):
            checked("eval_everything", "model_path=o/m", "eval_task=[versions,b,c,d]")

    @pytest.mark.parametrize("name", ["../../x", "/x", ".."])
    def test_a_methods_name(self, name):
        with pytest.raises(BadInput, match="forget_loss.name="):
            checked("forget", f"forget_loss.name={name}")

    def test_an_index_of_weights(self, model, tmp_path):
        shutil.move(model / "model.safetensors", tmp_path / "other.safetensors")
        names = load_file(tmp_path / "other.safetensors")
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, "../other.safetensors")}
        (model / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(BadInput, match="names ../other.safetensors, which is outside of the folder"):
            folders.resolve(str(model), "model_path")

    def test_a_data_sets_card(self, tmp_path):
        (tmp_path / "secret.json").write_text('{"question": "a", "answer": "b"}\n')
        (tmp_path / "data").mkdir()
        card = "---\nconfigs:\n- config_name: full\n  data_files: ../secret.json\n---\n"
        (tmp_path / "data" / "README.md").write_text(card)
        with pytest.raises(BadInput, match="names ../secret.json, which is outside of the folder"):
            utils.split_files(str(tmp_path / "data"))

    def test_overwriting_stays_in_its_folder(self, tmp_path):
        """Neither lines of a foreign written.txt nor links lead a removal elsewhere."""
        outside = tmp_path / "outside"
        outside.mkdir()
        for name in ("eval_log.json", "versions.json", "x"):
            (outside / name).write_text("{}")
        (outside / run_folder.WRITTEN).write_text("eval_log.json\nx\n")
        run = run_folder.start_run(CFG, tmp_path / "run", overwrite=False, inputs=())
        with (run / run_folder.WRITTEN).open("a") as file:
            file.write(f"../outside/x\n../../{tmp_path.name}/outside/x\n{outside}/x\n")
        for link in ("checkpoint-1", "eval_results", f"{utils.ASIDE}model.x"):
            (run / link).symlink_to(outside)
        run_folder.start_run(CFG, run, overwrite=True, inputs=())
        assert {path.name for path in outside.iterdir()} == {
            "eval_log.json", "versions.json", "x", run_folder.WRITTEN,
        }  # fmt: skip


SECRETS = {  # what is typed -> what is written down
    "data_path=https://me:pass@host/x": "data_path=https://***@host/x",
    "https://tok@github.com/a": "https://***@github.com/a",
    "hf_abcdefghijklmnopqrstuv": "***",
    "+tracker.api_key=hunter2 lr=3": "+tracker.api_key=*** lr=3",
    "'wandb_api_key': 'x1'": "'wandb_api_key': '***'",
    "hub_token: abcd1234efgh": "hub_token: ***",
    "Authorization: Bearer abcdefgh12345": "Authorization: Bearer ***",
    "sk-proj-abcdefghij0123456789": "***",
    "raw 0123456789abcdef0123456789abcdef01234567": "raw ***",  # an environment variable's value
}
PLAIN = ("end_token=<|im_end|>", "generation.max_new_tokens=200", "rouge.tokenizer=unicode", "num_token_gt: 12345678")
PLAIN += ("eos_token=token1234567", "commit 4fc7983aaaa", "runs/hf_models_of_mine/abc", "runs/sk-learn-experiments-lr")


def test_credentials_are_masked_and_nothing_else(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123456789abcdef01234567")
    assert {text: utils.masked(text) for text in SECRETS} == SECRETS
    assert all(utils.masked(text) == text for text in PLAIN)


def test_no_credential_is_in_what_a_run_writes(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["forget.py", "lr=1e-5", "data_path=https://me:secretword@host/x"])
    cfg = OmegaConf.create({"lr": 1e-5, "data_path": "https://me:secretword@host/x"})
    run = run_folder.start_run(cfg, tmp_path / "run", overwrite=False, inputs=())
    run_folder.finish_run(run, {})
    assert not [path.name for path in run.iterdir() if "secretword" in path.read_text()]
    assert OmegaConf.load(run / "config.yaml").data_path == "https://***@host/x"


def test_none_is_in_an_error_line(run_script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        run_script("finetune.py", "model_family=tiny", "data_path=https://me:secretword@host/x", "save_dir=out")
    out, err = capsys.readouterr()
    assert "data_path=https://***@host/x" in err and "secretword" not in out + err
