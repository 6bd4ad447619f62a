"""scripts/check_model.py tells what fits a tokenizer and what does not."""

import importlib.util
import json
import shutil

import pytest
import yaml
from helpers import REPO

SPEC = importlib.util.spec_from_file_location("check_model", REPO / "scripts" / "check_model.py")
check_model = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(check_model)


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the script in this process: its exit code and lines."""

    def go(*args):
        monkeypatch.setattr("sys.argv", ["check_model.py", *map(str, args)])
        with pytest.raises(SystemExit) as end:
            check_model.main()
        told = capsys.readouterr()
        return end.value.code, told.out + told.err

    return go


@pytest.mark.parametrize("weights", [[], ["--weights"]])
def test_a_family_that_fits(run, model_folder, weights):
    code, out = run("tiny", "--model", model_folder, *weights)
    checks = dict(line[6:].partition(": ")[::2] for line in out.splitlines() if line.startswith("ok  "))
    assert not code and list(checks) == [
        *("begin token at most once", "end token scored once, last", "the prompt begins what is trained"),
        *("answers come back", "packed = padded", "tree = plain"),
    ]
    assert checks["end token scored once, last"] == "[1, 1, 1] times </s>"
    assert "no entry from the tokenizer's chat template" in out
    first = out.splitlines()[0]
    assert "[</s>]" in first and first.count("[") == first.count("]") > 5  # what is scored stands in brackets


def test_what_does_not_fit(run, model_folder, monkeypatch):
    """Tags that let a tokenizer lose the answer's own text."""
    lost = check_model.data_module.encode

    def without_end(*args, **kwargs):
        sample = lost(*args, **kwargs)
        return sample._replace(targets=(*sample.targets[:-1], sample.targets[-2]))

    monkeypatch.setattr(check_model.data_module, "encode", without_end)
    code, out = run("tiny", "--model", model_folder)
    assert code == 1 and "FAIL  end token scored once, last: [0, 0, 0] times </s>" in out


def test_the_entry_that_a_chat_template_makes(run, model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "chat")
    about = json.loads((folder / "tokenizer_config.json").read_text())
    user, model = "Q: {{ m['content'] }}\\nA: ", "{{ m['content'] }}</s>"
    about["chat_template"] = (
        f"{{% for m in messages %}}{{% if m['role'] == 'user' %}}{user}{{% else %}}{model}{{% endif %}}{{% endfor %}}"
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(about).replace("\\\\n", "\\n"))
    code, out = run("tiny", "--model", folder)
    assert not code and yaml.safe_load(out[out.index("tiny-chat:") :]) == {
        "tiny-chat": {
            "hf_key": str(folder),
            "question_start_tag": "Q: ",
            "question_end_tag": "\nA: ",
            "answer_tag": "",
            "end_token": "</s>",
        }
    }


def test_a_family_that_is_none(run):
    code, told = run("tinny")
    assert code == 2 and told.startswith("error: ") and "did you mean tiny?" in told
