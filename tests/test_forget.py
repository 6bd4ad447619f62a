"""forget.py's methods run: what each moves, what each leaves, what each refuses."""

import dataclasses
import json
import math
import os
from unittest.mock import patch

import pytest
import torch
from helpers import METHODS, read_table
from transformers import AutoModelForCausalLM

from tofu.methods import losses, objective, pdu, rmu, task_vector
from tofu.models import families
from tofu.runtime import provenance, trained_on

STEPS = 4  # of 20 rows in batches of 10, two epochs


@pytest.fixture
def run(model_folder, tmp_path, run_script):
    """forget.py in this process, as its command line would be; its steps' log lines and its saved weights."""

    def run(*args, name="run", steps=STEPS):
        common = ("model_family=tiny", "data_path=data/mini", "engine=ddp", f"model_path={model_folder}")
        common += ("split=forget05", "batch_size=10", "gradient_accumulation_steps=1", "num_epochs=2", "lr=1e-3")
        run_script("forget.py", *common, *args, f"save_dir={tmp_path / name}")
        history = json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]
        lines = [line for line in history if "loss" in line]
        assert len(lines) == steps
        return lines, weights(tmp_path / name)

    return run


@pytest.fixture
def alternates(tmp_path):
    """Two wrong answers for each row: those of the rows that follow."""
    rows = read_table("forget05")
    lines = [
        {"question": row["question"], "answer": row["answer"], "alternate": rows[(i + k) % len(rows)]["answer"]}
        for i, row in enumerate(rows)
        for k in (1, 2)
    ]
    path = tmp_path / "alternates.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def weights(folder) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())


def moved(one, other) -> set[str]:
    return {name for name in one if not torch.equal(one[name], other[name])}


def error_of(capsys) -> str:
    return capsys.readouterr().err


@pytest.mark.parametrize("lora", [(), ("LoRA.r=4", "LoRA.dropout=0", "lr=1e-2")], ids=["full", "lora"])
def test_rmu_trains_what_it_names(run, model_folder, tmp_path, lora):
    """The steered block is the first of two; both terms start where they must, and the vector is kept."""
    lines, saved = run("forget_loss=rmu", *lora)
    assert moved(saved, weights(model_folder)) == {"model.layers.0.mlp.down_proj.weight"}
    assert lines[0]["retain_loss"] == pytest.approx(0, abs=1e-9) and lines[-1]["retain_loss"] > 0
    assert lines[-1]["forget_loss"] < lines[0]["forget_loss"]
    kept = json.loads((tmp_path / "run" / rmu.CONTROL).read_text())
    assert kept["block"] == 0 and math.hypot(*kept["vector"]) == pytest.approx(1, abs=1e-6)
    assert kept["vector"] == rmu.control_vector(32, 42).tolist()


def test_rmu_with_cross_entropy_on_the_retain_set(run, model_folder):
    """The states of one part and the logits of another, in one forward; all of the second block's output counts."""
    _, saved = run("forget_loss=rmu", "forget_loss.retain=nll", "forget_loss.depth=1", "forget_loss.blocks=1")
    assert moved(saved, weights(model_folder)) == {"model.layers.1.mlp.down_proj.weight"}


def test_rmu_under_gradient_checkpointing(run, monkeypatch):
    """A block's output is seen once, however often the backward makes it again."""
    plain, _ = run("forget_loss=rmu")
    family = dataclasses.replace(families.family("tiny"), gradient_checkpointing=True)
    monkeypatch.setattr(families, "family", lambda name: family)
    again, _ = run("forget_loss=rmu", name="again")
    assert [line["loss"] for line in again] == pytest.approx([line["loss"] for line in plain], abs=1e-6)


@pytest.mark.parametrize(("batch_size", "accumulation"), [(10, 1), (5, 2)])
def test_the_dual_variable_moves_once_a_step(run, tmp_path, batch_size, accumulation):
    """From the global mean retain loss, after its warm-up of one epoch (two steps), never below 0; kept at the end."""
    lines, _ = run(
        *("forget_loss=pdu", "forget_loss.dual_warmup_epochs=1", "forget_loss.retain_weight=2"),
        *(f"batch_size={batch_size}", f"gradient_accumulation_steps={accumulation}"),
    )
    dual = 2.0
    for step, line in enumerate(lines, 1):
        total = line["forget_loss"] + dual * (line["retain_loss"] - 0.3)
        assert line["loss"] == pytest.approx(total, rel=1e-5)
        if step > 2:
            dual = max(0.0, dual + 5 * (line["retain_loss"] - 0.3))
        assert line["dual"] == pytest.approx(dual, rel=1e-5)
    assert dual > 10 and json.loads((tmp_path / "run" / "finished.json").read_text())["dual"] == lines[-1]["dual"]


def test_a_dual_variable_never_falls_below_zero():
    """100 + 5 (0.904942 - 0.3) = 103.024710; with a bound of 5 and eta 30 it is cut at 0."""
    terms = [objective.Term("forget", losses.pdu), objective.Term("retain", losses.nll, 100.0)]
    for bound, eta, expected in ((0.3, 5, 103.024710), (5, 30, 0.0)):
        method = pdu.Pdu(terms, epsilon=bound, eta=eta, dual_warmup_epochs=3)  # of one step each
        for _ in range(3):
            method.after_step({"retain": 0.904942})
        assert method.dual == 100
        method.after_step({"retain": 0.904942})
        assert method.dual == method.term_weight(method.terms[1], 0.5) == pytest.approx(expected, abs=1e-6)
        again = pdu.Pdu(terms, epsilon=bound, eta=eta, dual_warmup_epochs=3)
        again.load_state_dict(method.state_dict())
        assert again.result() == method.result() == {"dual": method.dual}


def test_a_task_vector_is_gone_the_other_way(run, model_folder):
    """What is saved is as far from the start as finetuning on the forget set went, on the other side, times alpha."""
    start = weights(model_folder)
    negate = ("forget_loss=task_vector", "forget_loss.negate=0.5")
    lines, saved = run(*negate)
    _, learned = run("forget_loss=task_vector", "forget_loss.negate=-1", name="learned")
    assert lines[-1]["loss"] < lines[0]["loss"]
    for name, before in start.items():
        torch.testing.assert_close(saved[name], before - 0.5 * (learned[name] - before), rtol=0, atol=1e-6)
    assert moved(saved, start)
    _, adapters = run(*negate, "LoRA.r=4", "LoRA.dropout=0", name="adapters")
    assert moved(adapters, start) == {name for name in start if "_proj" in name}


def test_task_negated_by_hand():
    """docs/methods.md has the numbers."""
    start, finetuned = torch.tensor([1, -2, 0.5]), torch.tensor([1.5, -1, 0.25])
    assert task_vector.negated(start, finetuned, 0.5).tolist() == [0.75, -2.5, 0.625]


def test_idk_with_kl(run):
    """Two terms read the retain samples, at the answer's positions and at all: each its own mean."""
    plain, _ = run("forget_loss=idk")
    lines, _ = run("forget_loss=idk", "forget_loss.retain=kl", name="kl")
    assert lines[0]["forget_loss"] == pytest.approx(plain[0]["loss"], rel=1e-5)
    assert lines[0]["retain_loss"] == pytest.approx(0, abs=1e-6) and lines[-1]["retain_loss"] > 1e-3


def test_altpo_takes_its_alternates_from_a_file(run, alternates):
    """Two alternates a row are twice the places; the first step is where both models agree."""
    lines, _ = run("forget_loss=altpo", f"forget_loss.alternates={alternates}", steps=8)
    assert lines[0]["forget_loss"] == pytest.approx(20 * math.log(2), abs=1e-4)
    assert lines[-1]["forget_loss"] < lines[1]["forget_loss"]


def test_what_is_logged_each_step(run):
    """The parts, their gradients' norms on request, the tokens read so far; the whole norm where it is looked at."""
    lines, _ = run("forget_loss=npo_KL", "log_gradient_norms=true", "max_grad_norm=1e9")
    for line in lines:
        assert line["loss"] == pytest.approx(line["forget_loss"] + line["retain_loss"], rel=1e-5)
    assert lines[0]["retain_grad_norm"] == pytest.approx(0, abs=1e-4)  # KL is least where both models agree
    assert lines[0]["forget_grad_norm"] == pytest.approx(lines[0]["grad_norm"], rel=1e-4)
    assert lines[-1]["retain_grad_norm"] > 0.01
    tokens = [line["tokens"] for line in lines]
    assert tokens == sorted(tokens) and 1.9 < tokens[3] / tokens[1] < 2.1 and tokens[1] > 20 * 2 * 30


def test_gradient_norms_do_not_depend_on_the_cut(run):
    one, _ = run("forget_loss=grad_diff", "log_gradient_norms=true")
    cut = ("batch_size=5", "gradient_accumulation_steps=2")
    other, _ = run("forget_loss=grad_diff", "log_gradient_norms=true", *cut, name="other")
    for key in ("forget_grad_norm", "retain_grad_norm", "tokens"):
        assert [line[key] for line in one] == pytest.approx([line[key] for line in other], rel=1e-4)


def test_names_from_elsewhere(run, tmp_path, capsys):
    """The command line's NPO is npo_grad_diff, and the log says so."""
    run("forget_loss=NPO")
    assert "forget_loss=NPO" in (tmp_path / "run" / provenance.VERSIONS).read_text()  # scripts/tofu.sh asks for it so
    assert "name: npo_grad_diff" in (tmp_path / "run" / provenance.CONFIG).read_text()
    assert "taken as: " in (told := capsys.readouterr().out) and "forget_loss=npo_grad_diff" in told


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (
            ("forget_loss=altpo",),
            "forget_loss.alternates is missing: give forget_loss.alternates=..., a file that scripts",
        ),
        (("forget_loss=npo", "forget_loss.retain_weight=-1"), "forget_loss.retain_weight=-1.0: it must be at least 0"),
        (("forget_loss=npo", "forget_loss.forget_args.bta=1"), "did you mean forget_loss.forget_args.beta"),
        (("forget_loss=altpo", "forget_loss.alternates=nowhere"), "no such file; scripts/make_alternates.py"),
        (
            ("forget_loss=npo", "forget_loss.retain=embed_diff"),
            "needs ++forget_loss.depth=... ++forget_loss.blocks=...",
        ),
        (("forget_loss=rmu", "forget_loss.depth=1.5"), "it is a share of the blocks, at most 1"),
        (("forget_loss=pdu", "forget_loss.retain=null"), "the constraint forget_loss.epsilon is on a retain term"),
        (
            ("forget_loss=idk", "forget_loss.retain=embed_diff"),
            "idk reads the retain samples' logits, and so cannot have",
        ),
        (("forget_loss=npo", "++forget_loss.blocks=3"), "forget_loss.blocks is no key of npo"),
        (("forget_loss=pdu", "forget_loss.epsilon=null"), "needs ++forget_loss.epsilon=..."),
        (("forget_loss=npo", "++forget_loss.negate=1"), "forget_loss.negate is no key of npo"),
        (
            ("forget_loss=task_vector", "forget_loss.negate=null"),
            "forget_loss.negate is missing: task_vector needs ++forget_loss.negate",
        ),
        (("forget_loss=npo", "++forget_loss.alternates=x"), "forget_loss.alternates is no key of npo"),
        (("forget_loss=rmu", "torch_compile=true"), "does not go with rmu, which looks at hidden states"),
        (("forget_loss=task_vector", "eval_while_train=true"), "evaluate the saved model with evaluate_util.py"),
        (("forget_loss=ceu", "forget_loss.forget_args.skip=0.5"), "it must be a whole number"),
        (("log_gradient_norms=true", "engine=deepspeed"), "needs whole gradients, engine=ddp"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_refusals(run, capsys, tmp_path, args, said):
    with patch.dict(os.environ), pytest.raises(SystemExit, match="2"):  # DeepSpeed leaves a rank there
        run(*args)
    assert said in error_of(capsys) and not (tmp_path / "run").exists()


def test_a_sweep_is_refused_before_its_first_job(run, capsys, tmp_path):
    with pytest.raises(SystemExit, match="2"):
        run("-m", "forget_loss=npo,altpo", name="${forget_loss.name}")
    assert "forget_loss=altpo" in (told := error_of(capsys)) and "forget_loss.alternates is missing" in told
    assert not list(tmp_path.iterdir())


def test_alternates_of_another_split_are_refused(run, capsys, alternates):
    with pytest.raises(SystemExit, match="2"):
        run("forget_loss=altpo", f"forget_loss.alternates={alternates}", "split=forget10")
    assert "made for another split: 20 rows of the forget set have none in it, and 0 of its rows are not" in error_of(
        capsys
    )


def test_a_term_that_is_not_finite_stops_the_run(run, capsys, tmp_path):
    """With the step, the part and the remedy; the log so far is whole, and there is no model."""
    with pytest.raises(SystemExit, match="2"):
        run("forget_loss=grad_diff", "lr=1e6")
    assert "the model has diverged; take a smaller lr than 1000000.0" in (told := error_of(capsys)) and "step " in told
    assert json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert not (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("lora", [(), ("LoRA.r=4", "LoRA.dropout=0")], ids=["full", "lora"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method(run, model_folder, alternates, method, lora):
    """Full and with adapters: the model moves, and packed and padded runs have the same losses."""
    own = (f"forget_loss.alternates={alternates}",) if method == "altpo" else ()
    args, steps = (f"forget_loss={method}", *own, *lora), 8 if own else STEPS
    packed, saved = run(*args, steps=steps)
    assert moved(saved, weights(model_folder))
    padded, _ = run(*args, "packing=false", name="padded", steps=steps)
    assert [line["loss"] for line in packed] == pytest.approx([line["loss"] for line in padded], rel=1e-4, abs=1e-5)


@pytest.mark.slow
def test_attacks_during_training_leave_it_alone(run, tmp_path, model_folder):
    """Gradient norms and a reference model at each epoch's end: the weights and losses are those without them."""
    small = ("eval.ds_size=4", "eval.generation.max_length=80", "eval.generation.max_new_tokens=2")
    asked = ("eval.metrics=[privacy,mia_gradient_norm]", f"eval.reference_model={model_folder}")
    lines, after = run("forget_loss=grad_diff", "eval_while_train=true", *small, name="plain")
    again, attacked = run("forget_loss=grad_diff", "eval_while_train=true", *small, *asked, name="attacked")
    assert not moved(after, attacked)
    assert [one["loss"] for one in lines] == [one["loss"] for one in again]
    first, last = (
        json.loads((tmp_path / "attacked" / f"checkpoint-{step}" / "metrics.json").read_text()) for step in (2, STEPS)
    )
    for attack in ("MIA loss", "MIA reference", "MIA gradient norm"):
        assert (first[attack]["members"], last[attack]["holdout"]) == (4, "holdout05")
    assert (tmp_path / "attacked" / "reference_losses.json").is_file()
    taught = trained_on.read(tmp_path / "attacked")
    assert not taught.whole and len(taught.questions) == 400  # the start is a foreign folder
