"""Greedy generation by vLLM (`generation.backend=vllm`), in a process of its own.

When that process ends, whatever vLLM had on the card is gone: the model that scores is loaded after it, so that there
are never two. Importing this module loads no torch.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tofu.runtime import ranks
from utils import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tofu.evaluation.sets import Task

log = logging.getLogger(__name__)

BACKENDS = ("ours", "vllm")
PYTHON = "TOFU_VLLM_PYTHON"  # environment variable: the Python of an environment that has vLLM, where ours has not
WORKER = Path(__file__).with_name("vllm_worker.py")
# a launcher's, or DeepSpeed's: vLLM would take itself for one of its processes
LAUNCHER = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)
SHOWN = 20  # last lines of what vLLM said, where it fails


def check_asked(backend: str, prefix: str = "", *, why_not: str | None = None) -> None:
    """Refuse vLLM where it can't be had; called by the command line, before anything is loaded.

    Args:
        prefix: what stands before `generation.backend` in the config's keys.
        why_not: what else of the config does not go with it.

    Raises:
        BadInput: `why_not`; several processes; no vllm package, or no such Python.
    """
    if backend != "vllm":
        return
    if ranks.world_size() > 1:
        why_not = f"runs in one process, and there are {ranks.world_size()}"
    if why_not:
        raise BadInput(f"{prefix}generation.backend=vllm {why_not}: take {prefix}generation.backend=ours")
    python = os.environ.get(PYTHON)
    if python and shutil.which(python) is None:
        raise BadInput(f"{PYTHON}={python}: no such program; it must be the Python of an environment with vLLM")
    if not python and importlib.util.find_spec("vllm") is None:
        raise BadInput(_needs(prefix))


def check(backend: str, path: str, prefix: str = "") -> None:
    """Refuse vLLM for this machine or this model; called before a run has a folder or reads a weight.

    Args:
        path: the model, as `folders.resolve` gave it.
        prefix: as of `check_asked`.

    Raises:
        BadInput: no CUDA, or a folder with only an adapter.
    """
    if backend != "vllm":
        return
    import torch

    from tofu.models import folders

    if not torch.cuda.is_available():
        raise BadInput(_needs(prefix))
    if folders.is_adapter(path):
        raise BadInput(
            f"{prefix}generation.backend=vllm: {path} holds only an adapter, and it reads whole models: merge it first "
            f"(our runs save merged models), or take {prefix}generation.backend=ours"
        )


def _needs(prefix: str) -> str:
    return (
        f"{prefix}generation.backend=vllm needs a CUDA GPU and the vllm package, here or in the environment of "
        f"{PYTHON} (docs/evaluation.md): or take {prefix}generation.backend=ours"
    )


def generate(
    path: str, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task], *, bf16: bool
) -> dict[str, list[list[int]]]:
    """What vLLM writes to the prompts of all sets, with `inference.greedy`'s token ids, budgets and end tokens.

    Args:
        path: the model, as `folders.resolve` gave it; `check` passed it.
        bf16: whether it computes in bf16, else in float32.

    Returns:
        Task -> the new tokens of each row, without the end token; none for a row whose prompt leaves no room.

    Raises:
        BadInput: vLLM failed; what it said last is in the line, and more of it in the log.
    """
    asked = [(task, i) for task in tasks for i, budget in enumerate(task.budgets) if budget]
    found = {task.data.task: [[] for _ in task.prompts] for task in tasks}
    if not asked:
        return found
    prompts, budgets = ([getattr(task, what)[i] for task, i in asked] for what in ("prompts", "budgets"))
    ends = _ends(path, tokenizer)
    log.info("vLLM generates %d answers, in a process of its own", len(asked))
    answers = _run(
        {
            "model": path,
            "dtype": "bfloat16" if bf16 else "float32",
            "longest": max(len(prompt) + budget for prompt, budget in zip(prompts, budgets, strict=True)),
            "prompts": prompts,
            "budgets": budgets,
            "ends": ends,
        }
    )
    for (task, i), tokens in zip(asked, answers, strict=True):
        found[task.data.task][i] = tokens[:-1] if tokens and tokens[-1] in ends else tokens
    return found


def _ends(path: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """`inference.end_tokens` of a model that is not loaded: its generation config is read with its shapes alone."""
    from transformers import AutoModelForCausalLM

    from tofu.evaluation import inference

    shell = AutoModelForCausalLM.from_pretrained(path, device_map="meta", trust_remote_code=False)
    return inference.end_tokens(shell, tokenizer)


def _run(asked: dict) -> list[list[int]]:
    """What the worker answers.

    Raises:
        BadInput: it failed.
    """
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder, "asked.json"), Path(folder, "answers.json")
        files[0].write_text(json.dumps(asked))
        python = os.environ.get(PYTHON) or sys.executable
        done = subprocess.run(
            [python, "-P", str(WORKER), *map(str, files)],  # -P: this folder's modules are not in its way
            env={**environment, "VLLM_NO_USAGE_STATS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        if done.returncode == 0:
            return json.loads(files[1].read_text())
    said = [line for line in done.stdout.splitlines() if line.strip()] or ["nothing"]
    log.warning("vLLM said, in the end:\n%s", "\n".join(said[-SHOWN:]))
    raise BadInput(
        f"generation.backend=vllm: vLLM ended with exit code {done.returncode} ({said[-1].strip()[:300]}): take "
        "generation.backend=ours"
    )
