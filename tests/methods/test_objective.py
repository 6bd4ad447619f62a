"""A method is one object: found by its YAML, its keys its own, its hooks called; adding one touches no other file."""

import json
import sys

import pytest
import torch
from helpers import NEEDED, checked
from omegaconf import OmegaConf

from tofu.methods import losses, objective
from tofu.methods.objective import Method
from utils import BadInput

ADAPTIVE = '''"""A retain weight that keeps the retain loss where it starts."""

from dataclasses import dataclass

from tofu.methods.objective import Method


class Adaptive(Method):
    """The retain term's weight grows while its loss is above that of the first step, and falls below it."""

    @dataclass
    class Keys:
        """See the YAML."""

        rate: float

    def __init__(self, terms, **own):
        super().__init__(terms, **own)
        self.weight, self.first, self.seen = self.terms[-1].weight, None, []

    def term_weight(self, term, progress):
        self.seen.append(progress)
        return self.weight if term.name == "retain" else term.weight

    def after_step(self, means):
        self.first = means["retain"] if self.first is None else self.first
        self.weight = max(0.0, self.weight + self.keys.rate * (means["retain"] - self.first))

    def result(self):
        return {"retain_weight": self.weight}

    def state_dict(self):
        return {"weight": self.weight, "first": self.first}

    def load_state_dict(self, state):
        self.weight, self.first = state["weight"], state["first"]
'''
KEYS = ("class=adaptive.Adaptive", "rate=2.0")


@pytest.fixture
def adaptive(tmp_path, monkeypatch):
    """A module of somebody's own, as a file of tofu/methods/ would be; its overrides make a file of forget_loss/."""
    (tmp_path / "adaptive.py").write_text(ADAPTIVE)
    monkeypatch.syspath_prepend(tmp_path)
    yield [f"++forget_loss.{key}" for key in KEYS]
    sys.modules.pop("adaptive", None)


def test_a_method_with_state_is_one_file(adaptive, model_folder, tmp_path, run_script):
    """Its weight is what the log says: raised by rate times the excess of the retain loss over its start."""
    args = ("model_family=tiny", "data_path=data/mini", "engine=ddp", f"model_path={model_folder}", "split=forget05")
    args += (
        "forget_loss=grad_diff",
        *adaptive,
        "forget_loss.name=adaptive",
        "batch_size=10",
        "num_epochs=2",
        "lr=1e-2",
    )
    scores = run_script("forget.py", *args, "gradient_accumulation_steps=1", f"save_dir={tmp_path}/run")
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    lines, weight = [line for line in history if "loss" in line], 1.0
    for line in lines:
        assert line["loss"] == pytest.approx(line["forget_loss"] + weight * line["retain_loss"], rel=1e-4)
        weight = max(0.0, weight + 2.0 * (line["retain_loss"] - lines[0]["retain_loss"]))
        assert line["retain_weight"] == pytest.approx(weight, rel=1e-4)
    assert len(lines) == 4 and weight != 1.0
    finished = json.loads((tmp_path / "run" / "finished.json").read_text())
    assert finished["retain_weight"] == scores["retain_weight"] == lines[-1]["retain_weight"]


def test_its_hooks_and_state(adaptive):
    cfg = checked("forget", "forget_loss=grad_diff", *adaptive).forget_loss
    method = objective.method_of(cfg)
    assert objective.overrides(method, "after_step") and not objective.overrides(method, "before_saving")
    method.after_step({"forget": -1.0, "retain": 0.5})
    method.after_step({"forget": -1.0, "retain": 0.75})
    assert method.term_weight(method.terms[1], 0.5) == 1.5 and method.seen == [0.5]
    again = objective.method_of(cfg)
    again.load_state_dict(json.loads(json.dumps(method.state_dict())))
    assert again.result() == method.result() == {"retain_weight": 1.5}


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["++forget_loss.rate=fast"], "forget_loss.rate=fast: it must be a number"),
        (["~forget_loss.rate"], "forget_loss.rate is missing: grad_diff needs ++forget_loss.rate=..."),
        (["++forget_loss.rat=1"], "forget_loss.rat is no key of grad_diff (did you mean forget_loss.rate"),
        (["forget_loss.class=adaptive.Adaptiv"], "forget_loss.class=adaptive.Adaptiv cannot be imported"),
        (["forget_loss.class=nowhere.Adaptive"], "No module named 'nowhere'"),
        (["forget_loss.class=collections.OrderedDict"], "is no subclass of tofu.methods.objective.Method"),
        (
            ["forget_loss.retain=embed_diff"],
            "looks at hidden states, as forget_loss=rmu does: it needs ++forget",
        ),
    ],
)
def test_what_a_method_is_refused_for(adaptive, overrides, said):
    with pytest.raises(BadInput) as refusal:
        checked("forget", "forget_loss=grad_diff", *adaptive, *overrides)
    assert said in str(refusal.value)


def test_a_class_is_imported_only_when_its_method_is_chosen(monkeypatch):
    imported = []
    monkeypatch.setattr(objective.importlib, "import_module", imported.append)
    assert objective.class_of(OmegaConf.create({"forget": "npo"})) is Method and imported == []


def test_a_signature_is_read_when_it_is_used(monkeypatch):
    """A wrong one stops the method that names it, with the remedy, and no other."""

    def capped(forget: losses.Scored) -> torch.Tensor: ...

    def eager(forget: losses.Scored, *, beta: float = 1.0) -> losses.PerToken: ...

    for loss, said in ((capped, "annotate what it returns as PerToken or PerSequence"), (eager, "beta has a default")):
        monkeypatch.setitem(losses.FORGET, loss.__name__, loss)
        with pytest.raises(BadInput, match=said):
            checked("forget", f"forget_loss.forget={loss.__name__}")
    assert checked("forget", "forget_loss=npo").forget_loss.forget == "npo"
    assert [term.name for term in objective.finetuning().terms] == ["retain"]


@pytest.mark.parametrize("method", ["rmu", "pdu", "task_vector", "altpo"])
def test_the_methods_with_state_declare_their_own_keys(method):
    """Every key of their files is the schema's or the class's own, and comes back typed."""
    cfg = checked("forget", f"forget_loss={method}", *NEEDED.get(method, [])).forget_loss
    kind = objective.class_of(cfg)
    assert kind is not Method and set(vars(objective.method_of(cfg).keys)) < set(cfg)
    with pytest.raises(BadInput, match="forget_loss.mine is no key of"):
        checked("forget", f"forget_loss={method}", "++forget_loss.mine=1", *NEEDED.get(method, []))


def half_nll(retain: losses.Scored, *, scale: float) -> losses.PerToken:
    """A retain loss with a hyper-parameter."""
    return scale * losses.nll(retain)


class TestRetainArgs:
    """A retain loss's hyper-parameters are keys, as the forget loss's are."""

    CHOSEN = ("forget_loss=grad_diff", "forget_loss.retain=half_nll")

    @pytest.fixture(autouse=True)
    def _listed(self, monkeypatch):
        monkeypatch.setitem(losses.RETAIN, "half_nll", half_nll)

    def test_they_reach_the_loss(self):
        cfg = checked("forget", *self.CHOSEN, "+forget_loss.retain_args.scale=0.5").forget_loss
        retain = objective.terms_of(cfg)[-1]
        assert retain.args == {"scale": 0.5}
        logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
        view = losses.Scored(logits, torch.tensor([1, 2, 3]), torch.tensor([0, 0, 0]))
        torch.testing.assert_close(retain.function(view, **retain.args), 0.5 * losses.nll(view))

    @pytest.mark.parametrize(
        ("args", "said"),
        [
            ([], "forget_loss.retain_args.*scale"),
            (["+forget_loss.retain_args.scael=1"], "forget_loss.retain_args=.'scael'.: half_nll takes scale"),
            (["+forget_loss.retain_args.scale=much"], "forget_loss.retain_args.scale=much"),
        ],
    )
    def test_wrong_ones_are_refused_before_loading(self, args, said):
        with pytest.raises(BadInput, match=said):
            checked("forget", *self.CHOSEN, *args)
