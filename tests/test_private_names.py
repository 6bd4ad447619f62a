"""The libraries' private names that the code relies on: each is listed here with a test of what it must do.

A library may change such a name in any release and say nothing. DeepSpeed's marks of a sharded parameter (`ds_id`,
`ds_tensor`, `ds_numel`) have no public counterpart either; tests/test_engines.py runs them.
"""

import ast
import inspect
import re

import accelerate
import pytest
from helpers import REPO
from transformers import (
    AutoModelForCausalLM,
    Gemma2ForCausalLM,
    LlamaForCausalLM,
    RwkvForCausalLM,
    Trainer,
    TrainingArguments,
)

import dataloader
from tofu.models import architectures
from tofu.runtime import ranks
from tofu.training import checkpoints

PRIVATE = {  # name -> where
    "_attn_implementation": {"architectures"},
    "_get_grad_norm": {"dataloader"},
    "_globalstep_last_logged": {"checkpoints"},  # with all below that stand in checkpoints: its tests resume runs
    "_initial_global_step": {"checkpoints"},
    "_load_from_checkpoint": {"checkpoints"},
    "_load_optimizer_and_scheduler": {"checkpoints"},
    "_save_checkpoint": {"checkpoints"},
    "_save_rng_state": {"checkpoints"},
    "_total_loss_scalar": {"checkpoints"},
    "_tr_loss": {"checkpoints"},
    "_get_num_items_in_batch": {"dataloader"},
    "_hf_deepspeed_config_weak_ref": {"judges"},
    "_prepare_inputs": {"dataloader"},
    "_n_gpu": {"optimisation"},
    "_python_dispatch": {"training"},  # torch's TorchDispatchMode; tests/test_gpu_calls.py runs it
    "_reset_state": {"ranks"},
    "_supports_attention_backend": {"architectures"},
    "_supports_flash_attn": {"architectures"},
    "_supports_flex_attn": {"architectures"},
    "_supports_sdpa": {"architectures"},
}
FILES = [file for where in ("*.py", "tofu/**/*.py", "scripts/*.py", "benchmarks/**/*.py") for file in REPO.glob(where)]
OTHERS = {"_replace", "_asdict"}  # a NamedTuple's, public in spite of their names


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def nodes() -> list[tuple[str, ast.AST]]:
    return [(path.stem, node) for path in FILES for node in ast.walk(ast.parse(path.read_text()))]


def defined(node: ast.AST) -> str | None:
    """The function, class or attribute of self that a statement defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return node.name
    stored = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
    return node.attr if stored and isinstance(node.value, ast.Name) and node.value.id == "self" else None


def named(node: ast.AST) -> list[str]:
    """The names that an expression or an import asks another object or module for."""
    if isinstance(node, ast.Attribute):
        return [node.attr]
    if isinstance(node, ast.Import | ast.ImportFrom):
        module = getattr(node, "module", None) or ""
        return [part for name in (module, *(alias.name for alias in node.names)) for part in name.split(".")]
    if isinstance(node, ast.Constant) and node.value in PRIVATE:  # as getattr takes it
        return [node.value]
    return []


def test_no_other_private_name_is_used():
    """What the repository itself defines is its own; a method of that name may still be a library's, overridden."""
    ours = {defined(node) for _, node in nodes()}
    theirs = set(re.findall(r"\bself\.(_\w+)", inspect.getsource(Trainer)))  # also what only its methods set
    kinds = {"dataloader": dataloader.TofuTrainer, "checkpoints": checkpoints.Resumable}
    found: dict[str, set[str]] = {}
    for stem, kind in kinds.items():
        for name in vars(kind):
            if private(name) and hasattr(Trainer, name):
                found.setdefault(name, set()).add(stem)
    overridden = set(found) | {defined(node) for stem, node in nodes() if stem == "checkpoints"} & theirs
    for stem, node in nodes():
        for name in named(node):
            if private(name) and name not in (ours - overridden) | OTHERS:
                found.setdefault(name, set()).add(stem)
    assert found == PRIVATE


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_config_says_which_attention_its_model_has(model_folder, attention):
    model = AutoModelForCausalLM.from_pretrained(model_folder, attn_implementation=attention)
    assert model.config._attn_implementation == attention
    assert AutoModelForCausalLM.from_pretrained(model_folder).config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"


def test_a_model_class_says_which_attentions_it_has():
    marks = {
        kind: [getattr(kind, mark) for mark in architectures.SUPPORT.values()]
        for kind in (LlamaForCausalLM, RwkvForCausalLM)
    }
    assert marks == {LlamaForCausalLM: [True] * 4, RwkvForCausalLM: [False] * 4}
    assert Gemma2ForCausalLM._supports_flash_attn and not Gemma2ForCausalLM._supports_sdpa


def test_release_forgets_what_accelerate_keeps():
    """Without it the second raises, for the precision of a process is set once."""
    ranks.release()  # what another test left in this process
    try:
        for precision, steps in (("bf16", 4), ("no", 1)):
            made = accelerate.Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=steps)
            assert (made.mixed_precision, made.gradient_accumulation_steps) == (precision, steps)
            ranks.release()
    finally:
        ranks.release()


def test_the_number_of_cards_can_be_set(tmp_path):
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", per_device_train_batch_size=2)
    args._n_gpu = 3
    assert args.n_gpu == 3 and args.train_batch_size == 6


def test_the_trainer_asks_for_the_number_of_terms_as_we_answer():
    ours, theirs = (inspect.signature(kind._get_num_items_in_batch) for kind in (dataloader.TofuTrainer, Trainer))
    assert list(ours.parameters) == list(theirs.parameters)
    assert "self._get_num_items_in_batch(" in inspect.getsource(Trainer.get_batch_samples)
