"""The fixtures of all tests: a tiny random model, and the two ways to run a script, as a process and in this one."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import environment  # noqa: F401 - first: what it sets is read when the others are imported
import pytest
from helpers import MINI, REPO

LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what a launcher sets


@pytest.fixture(autouse=True)
def own_process():
    """A test that makes its process one of a launch's, as `engine=deepspeed` does, makes it so for itself alone."""
    before = {name: os.environ.get(name) for name in LAUNCHER}
    yield
    changed = {name: value for name, value in before.items() if os.environ.get(name) != value}
    for name, value in changed.items():
        os.environ.pop(name, None) if value is None else os.environ.update({name: value})
    if changed:
        import torch

        from tofu.runtime import ranks

        ranks.release()  # it waits for the group's processes, so the group is still there
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama, as a family's folder."""
    return random_llama(tmp_path_factory.mktemp("random-llama"))


def random_llama(folder: Path) -> Path:
    """Write a Llama of 2 layers and width 32 with random weights and a tokenizer of 300 words; its folder."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    rows = [json.loads(line) for line in (MINI / "full.json").read_text().splitlines()]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((f"{row['question']}\n{row['answer']}" for row in rows), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def launch() -> Callable[..., subprocess.CompletedProcess]:
    """Run a script of the repository as a user does: `launch("forget.py", "lr=1e-3", processes=2, cwd=folder)`."""

    def run(script: str, *args: object, processes: int = 0, cwd: Path, check: bool = True, timeout: int = 600):
        start = [sys.executable]
        if processes:
            start += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
        done = subprocess.run(
            [*start, str(REPO / script), *map(str, args)],
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if check:
            assert done.returncode == 0, f"{script} {args}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
        return done

    return run


@pytest.fixture
def run_script(monkeypatch: pytest.MonkeyPatch) -> Callable[..., object]:
    """Run a script's main in this process, as its command line would be: `run_script("forget.py", "lr=1e-3")`.

    What the script returns comes back; a refusal is SystemExit(2), its line is on stderr.
    """
    import importlib

    def run(script: str, *args: object) -> object:
        monkeypatch.setattr("sys.argv", [script, *map(str, args)])
        return importlib.import_module(script.removesuffix(".py")).main()

    return run


@pytest.fixture
def evaluated(run_script, monkeypatch, model_folder, tmp_path):
    """evaluate_util.py as a command line, in this process: evaluated("ds_size=12", save_dir="x") -> the folder."""

    def go(*args: str, save_dir: str = "run"):
        base = ["model_family=tiny", f"data_path={MINI}", f"model_path={model_folder}", "generation.max_length=80"]
        monkeypatch.chdir(tmp_path)
        run_script("evaluate_util.py", *base, f"save_dir={save_dir}", "ds_size=4", *args)
        return tmp_path / save_dir

    return go
