"""What several tests need: the shared goldens where they are, a tiny random model, tables written for the purpose."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
SHARED = REPO.parent / "shared"
MINI = REPO / "data" / "mini"
GOLDEN = REPO / "tests" / "golden"  # small files that every clone has; SHARED holds the whole logs and the models

os.environ["OMP_NUM_THREADS"] = "1"  # two workers share the cores; it moves no number
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["PYTHONPATH"] = str(REPO)  # processes that a test starts import this checkout, whichever is installed
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on a hub

needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared (the real data and the goldens)")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 2 layers and width 32 with random weights and a tokenizer of 300 words, as a family's folder."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("random-llama")
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


def write_table(folder: Path, **tables: list[dict]) -> Path:
    """A data folder that `datasets.load_dataset(folder, split)` reads, one split a keyword."""
    folder.mkdir(parents=True, exist_ok=True)
    header = ["---", "configs:"]
    for name, rows in tables.items():
        (folder / f"{name}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
        header += [f"- config_name: {name}", f"  data_files: {name}.json"]
    (folder / "README.md").write_text("\n".join([*header, "---", ""]))
    return folder


def read_table(split: str, folder: Path = MINI) -> list[dict]:
    """The rows of one split of a data folder."""
    return [json.loads(line) for line in (folder / f"{split}.json").read_text().splitlines()]


@pytest.fixture(scope="session")
def launch() -> Callable[..., subprocess.CompletedProcess]:
    """Run a script of the repository as a user does: `launch("forget.py", "lr=1e-3", processes=2, cwd=folder)`."""

    def run(script: str, *args: object, processes: int = 0, cwd: Path, check: bool = True, timeout: int = 600):
        start = [sys.executable]
        if processes:
            start += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*start, str(REPO / script), *map(str, args)],
            cwd=cwd,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if check:
            assert done.returncode == 0, f"{script} {args}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
        return done

    return run
