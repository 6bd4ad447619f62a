"""The vLLM generator: what is around it with a stand-in of its documented interface; itself where a GPU has it."""

import json
import sys

import pytest
import torch
from helpers import MINI, checked
from transformers import LlamaConfig, LlamaForCausalLM

import data_module
from tofu.evaluation import inference, log_files, logs, row_logs, sets, vllm_backend
from tofu.models import families, folders, loading
from utils import BadInput

# what the worker uses of vLLM, in the words of its documentation; the answers are those that ours gave before
STAND_IN = """
import json, os, sys
from types import SimpleNamespace

class SamplingParams:
    def __init__(self, *, temperature, max_tokens, stop_token_ids, ignore_eos, detokenize):
        assert temperature == 0 and max_tokens >= 1 and ignore_eos and not detokenize
        self.max_tokens, self.stop_token_ids = max_tokens, stop_token_ids

class LLM:
    def __init__(self, *, model, dtype, max_model_len, seed):
        assert dtype == "float32" and "RANK" not in os.environ and "utils" not in sys.modules
        if os.environ.get("FAIL"):
            raise ValueError("no such architecture")
        self.longest, self.known = max_model_len, json.load(open(os.environ["KNOWN"]))

    def generate(self, prompts, sampling_params, *, use_tqdm):
        return [self.one(p["prompt_token_ids"], how) for p, how in zip(prompts, sampling_params, strict=True)]

    def one(self, ids, how):
        new = self.known.get(str(ids), [5])
        ended = [*new, how.stop_token_ids[0]] if len(new) < how.max_tokens else new
        assert len(ended) <= how.max_tokens and len(ids) + how.max_tokens <= self.longest
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(ended))])
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A package `vllm` that this process and its children find, on a machine that passes for one with a GPU."""
    folder, known = tmp_path / "packages", tmp_path / "known.json"
    folder.mkdir()
    (folder / "vllm.py").write_text(STAND_IN)
    known.write_text("{}")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setenv("KNOWN", str(known))
    monkeypatch.setattr(vllm_backend, "check", lambda *args: None)
    greedy = inference.greedy

    def remembered(model, prompts, *args, **kwargs):
        found = greedy(model, prompts, *args, **kwargs)
        answers = {str(list(prompt)): answer for prompt, answer in zip(prompts, found, strict=True)}
        known.write_text(json.dumps(json.loads(known.read_text()) | answers))
        return found

    monkeypatch.setattr(inference, "greedy", remembered)


def fingerprints(folder):
    return json.loads((folder / log_files.FINGERPRINTS).read_text())


def test_an_evaluation_with_it_is_the_same_evaluation(stand_in, evaluated, monkeypatch, capsys):
    """Every byte of the logs; nothing generates in this process; the fingerprint says what generated."""
    ours, theirs = evaluated(), evaluated_by_vllm(evaluated, monkeypatch)
    assert "vLLM generates 16 answers, in a process of its own" in capsys.readouterr().out
    assert (theirs / logs.AGGREGATED).read_bytes() == (ours / logs.AGGREGATED).read_bytes()
    for task, made_from in fingerprints(theirs).items():
        known = fingerprints(ours)[task]
        assert made_from["generation"] == {**known["generation"], "backend": "vllm"}
        assert known["generation"] == {"max_length": 80, "max_new_tokens": None}  # as it always was
        assert {**made_from, "generation": 0} == {**known, "generation": 0}
    evaluated("overwrite=false", save_dir="theirs")
    assert capsys.readouterr().out.count("evaluated, because it was made with other generation") == 4


def evaluated_by_vllm(evaluated, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv("RANK", "0")  # as a launcher or DeepSpeed sets it
        patch.setattr(row_logs, "generate_rows", None)
        return evaluated("generation.backend=vllm", save_dir="theirs")


def test_only_what_is_missing_is_generated(stand_in, evaluated, capsys):
    folder = evaluated("generation.backend=vllm")
    whole = (folder / logs.AGGREGATED).read_bytes()
    (folder / "eval_log.json").unlink()
    evaluated("generation.backend=vllm", "overwrite=false")
    said = capsys.readouterr().out
    assert "vLLM generates 16 answers" in said and "vLLM generates 4 answers" in said
    evaluated("generation.backend=vllm", "overwrite=false")
    assert "vLLM generates" not in capsys.readouterr().out
    assert (folder / logs.AGGREGATED).read_bytes() == whole


def test_forget_evaluates_without_training(stand_in, run_script, model_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    args = ("model_family=tiny", f"data_path={MINI}", f"model_path={model_folder}", "split=forget05", "eval_only=true")
    args += ("eval.ds_size=2", "eval.generation.max_length=80", "eval.generation.backend=vllm", "save_dir=run")
    scores = run_script("forget.py", *args)
    assert "vLLM generates 8 answers" in capsys.readouterr().out and "Model Utility" in scores


def test_its_failure_is_one_line(stand_in, evaluated, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("FAIL", "1")
    with pytest.raises(SystemExit, match="2"):
        evaluated("generation.backend=vllm")
    said = capsys.readouterr()
    assert (
        "error: generation.backend=vllm: vLLM ended with exit code 1 (ValueError: no such architecture): take "
        "generation.backend=ours\n"
    ) in said.err
    assert "vLLM said, in the end:" in said.out and not (tmp_path / "run").exists()


def test_another_environments_python(stand_in, monkeypatch, tmp_path):
    """TOFU_VLLM_PYTHON: this environment needs no vLLM then."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho used > "{tmp_path}/used"\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    monkeypatch.setenv(vllm_backend.PYTHON, str(python))
    monkeypatch.setattr(vllm_backend.importlib.util, "find_spec", lambda name: None)
    checked("eval_everything", "model_path=o/m", "generation.backend=vllm")
    asked = {"model": "m", "dtype": "float32", "longest": 9, "prompts": [[1, 4], [1]], "budgets": [1, 7], "ends": [2]}
    assert vllm_backend._run(asked) == [[5], [5, 2]] and (tmp_path / "used").is_file()
    monkeypatch.setenv(vllm_backend.PYTHON, str(tmp_path / "none"))
    with pytest.raises(BadInput, match=r"TOFU_VLLM_PYTHON=.*none: no such program"):
        checked("eval_everything", "model_path=o/m", "generation.backend=vllm")


def test_a_row_without_room_is_not_asked(model_folder, monkeypatch):
    tokenizer, task = prepared(model_folder, 3, max_length=80)
    task = task._replace(budgets=[4, 0, 9])
    monkeypatch.setattr(vllm_backend, "_run", lambda asked: [[7, 2] for _ in asked["prompts"]])
    found = vllm_backend.generate(str(model_folder), tokenizer, [task], bf16=False)
    assert found == {logs.FORGET: [[7], [], [7]]}  # 2 ends an answer
    monkeypatch.setattr(vllm_backend, "_run", None)
    nothing = task._replace(budgets=[0] * 3)
    assert vllm_backend.generate(str(model_folder), tokenizer, [nothing], bf16=False) == {logs.FORGET: [[], [], []]}


@pytest.mark.parametrize("named", [None, 5, [5, 2]])
def test_end_tokens_are_the_loaded_models(model_folder, tmp_path, named):
    """With a generation config of the model's own and without."""
    model, tokenizer = loading.load(str(model_folder)), folders.load_tokenizer(str(model_folder), None)
    model.generation_config.eos_token_id = named
    model.save_pretrained(tmp_path)
    if named is None:
        (tmp_path / "generation_config.json").unlink()
    expected = inference.end_tokens(loading.load(str(tmp_path)), tokenizer)
    assert vllm_backend._ends(str(tmp_path), tokenizer) == expected == ([2, 5] if named else [2])


@pytest.mark.parametrize(
    ("name", "overrides", "said"),
    [
        ("eval_everything", (), "generation.backend=vllm needs a CUDA GPU and the vllm package, here or in the"),
        (
            "eval_everything",
            ("reinitialize_weights=true",),
            "generation.backend=vllm reads a model from its folder, and reinitialize_weights=true draws weights: take",
        ),
        (
            "forget",
            ("eval_while_train=true",),
            "eval.generation.backend=vllm reads a model from its folder, and eval_while_train=true evaluates the one "
            "in memory: take eval.generation.backend=ours",
        ),
        ("forget", ("eval_only=true",), "eval.generation.backend=vllm needs a CUDA GPU and the vllm package"),
    ],
)
def test_refused_before_anything_is_loaded(name, overrides, said, monkeypatch):
    monkeypatch.setattr(vllm_backend.importlib.util, "find_spec", lambda name: None)
    key = "eval.generation.backend" if name == "forget" else "generation.backend"
    with pytest.raises(BadInput) as error:
        checked(name, "model_path=o/m", f"{key}=vllm", *overrides)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(BadInput, match="vllm runs in one process, and there are 2: take generation.backend=ours"):
        checked("eval_everything", "model_path=o/m", "generation.backend=vllm")


def test_a_machine_or_a_folder_that_it_cannot_use(monkeypatch, tmp_path):
    vllm_backend.check("ours", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BadInput, match="needs a CUDA GPU and the vllm package"):
        vllm_backend.check("vllm", "owner/model")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    vllm_backend.check("vllm", "owner/model")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(BadInput, match=r"eval.generation.backend=vllm: .* holds only an adapter"):
        vllm_backend.check("vllm", str(tmp_path), "eval.")


def prepared(folder, rows: int, **room: int):
    """The tokenizer, and the first rows of the forget set."""
    keys = ("question", "answer", "paraphrased_answer", "perturbed_answer")
    tokenizer = folders.load_tokenizer(str(folder), None)
    found = data_module.load_rows(str(MINI), "forget10_perturbed", keys, rows)
    return tokenizer, sets.prepare(sets.EvalSet(logs.FORGET, found, *keys), tokenizer, families.family("tiny"), **room)


TIE = 1e-3  # nats between two tokens of which rounding picks one


@pytest.mark.gpu
def test_its_text_is_ours_except_at_ties(model_folder, tmp_path):
    """In float32: the same tokens; where a row first differs, both are equally likely to the model, to rounding."""
    pytest.importorskip("vllm")
    tokenizer, task = prepared(model_folder, 40, max_length=120)
    torch.manual_seed(0)
    config = LlamaConfig(  # heads of 64, as its attention kernels want them
        **{"vocab_size": len(tokenizer), "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2},
        **{"num_attention_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.2},
        **{"bos_token_id": 1, "eos_token_id": 2},
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    theirs = vllm_backend.generate(str(tmp_path), tokenizer, [task], bf16=False)[logs.FORGET]
    model = loading.load(str(tmp_path)).cuda()
    with inference.ready(model, 120):
        ends = inference.end_tokens(model, tokenizer)
        ours = inference.greedy(model, task.prompts, task.budgets, ends, at_once=30)
        ties = differences(model, task.prompts, ours, theirs, ends)
    assert len(ties) < 4 and all(gap < TIE for gap in ties), ties


def differences(model, prompts, ours, theirs, ends) -> list[float]:
    """Of each answer that differs: how much less likely, in nats, the model finds their first other token than ours."""
    found = []
    for prompt, one, other in zip(prompts, ours, theirs, strict=True):
        if one == other:
            continue
        same = next((k for k, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
        logits = model(torch.tensor([[*prompt, *one[:same]]], device=model.device)).logits[0, -1].log_softmax(-1)
        best, rival = (logits[text[same] if same < len(text) else ends].max() for text in (one, other))
        found.append(float(best - rival))
    return found


def test_a_difference_is_measured_where_two_texts_part(model_folder):
    """A text that ends earlier differs by an end token; equal ones do not count."""
    model = loading.load(str(model_folder)).eval()
    with torch.no_grad():
        logp = model(torch.tensor([[1, 5, 6]])).logits[0, -1].log_softmax(-1)
        found = differences(model, [[1, 5], [1, 5], [1, 5]], [[6, 7], [6, 7], [6]], [[6, 8], [6], [6]], [2])
    assert found == pytest.approx([float(logp[7] - logp[8]), float(logp[7] - logp[2])], abs=1e-5)
