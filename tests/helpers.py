"""What several tests need: where things are, tables, composed configs, small random models, one evaluation."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import transformers
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

import data_module
from data_module import IGNORE, Sample
from tofu.cli import checks, command_line, schema
from tofu.cli.schema import CONFIG_DIR
from tofu.evaluation import evaluator, logs, sets
from tofu.methods import objective, references, rmu
from tofu.models import families, folders, loading
from tofu.reporting import page

REPO = Path(__file__).resolve().parents[1]
SHARED = REPO.parent / "shared"
MINI = REPO / "data" / "mini"
GOLDEN = REPO / "tests" / "golden"  # small files that every clone has; SHARED holds the whole logs and the models
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared (the real data and the goldens)")

KINDS = {
    "finetune": schema.Finetune,
    "forget": schema.Forget,
    "eval_everything": schema.Evaluate,
    "aggregate_eval_stat": schema.Aggregate,
    "compare": schema.Compare,
    "report": schema.Report,
}
NEEDED = {  # what has no default
    "eval_everything": ["model_path=owner/model"],
    "aggregate_eval_stat": [f"{key}=x" for key in ("retain_result", "ckpt_result", "submitted_by", "method_name")]
    + ["save_file=x.csv"],
    "compare": ["results=[a,b]"],
    "report": ["results=[a,b]"],
    "altpo": [f"forget_loss.alternates={Path(__file__)}"],
}
ENTRIES = sorted(path.stem for path in CONFIG_DIR.glob("*.yaml") if path.stem not in command_line.NO_ENTRIES)
METHODS = sorted(path.stem for path in (CONFIG_DIR / "forget_loss").glob("*.yaml"))

WORDS = 50
COMMON = {
    **{"vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "max_position_embeddings": 256, "initializer_range": 0.3},
    **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
}
GROUPED = {**COMMON, "num_key_value_heads": 2}
ARCHITECTURES = {
    "Llama": GROUPED,
    "Phi": COMMON,
    "GPTNeoX": COMMON,
    "StableLm": GROUPED,
    "Mistral": {**GROUPED, "sliding_window": 128},
    "Qwen2": GROUPED,
    "Qwen3": {**GROUPED, "head_dim": 8},
    "Gemma2": {**GROUPED, "head_dim": 8, "sliding_window": 128},
    "Phi3": GROUPED,
    "Gemma3Text": {**GROUPED, "head_dim": 8, "sliding_window": 128},
    "Olmo2": GROUPED,
    "Olmo3": {**GROUPED, "sliding_window": 128},
    "Qwen3Moe": {**GROUPED, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "SmolLM3": GROUPED,
    "Granite": GROUPED,
}


def write_table(folder: Path, **tables: list[dict]) -> Path:
    """A data folder that `datasets.load_dataset(folder, split)` reads, one split per keyword."""
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


def checked(name: str, *overrides: str) -> DictConfig:
    """A config as its script gets it, of the family llama2-7b unless an override or a preset names one."""
    named = any(one.startswith(("model_family=", "+experiment=")) for one in overrides)
    if name.startswith(("forget", "eval")) and not named:
        overrides = ("model_family=llama2-7b", *overrides)
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        cfg = compose(name, list(overrides))
    return checks.check(cfg, KINDS[name.removesuffix("_lora")])


def make(name: str) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**ARCHITECTURES[name])
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def rows(seed: int = 0) -> list[list[Sample]]:
    """Questions of several lengths with answers that begin alike, one twice, one that is another's beginning."""
    draw = torch.Generator().manual_seed(seed)

    def words(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, WORDS, (n,), generator=draw).tolist())

    found = []
    for length in (3, 9, 5):
        question, start = words(length), words(4)
        answers = [start + words(3), start + words(6), start, words(2), start]
        found.append([Sample(question + a, (IGNORE,) * (length - 1) + a + (2,), False) for a in answers])
    return found


def evaluate(path, data_path, folder, *, family="tiny", ds_size=None, split="forget10", **kwargs) -> dict:
    """Evaluate the model in `path` in this process; the aggregated log."""
    model_family = families.family(family)
    tokenizer = folders.load_tokenizer(str(path), None)
    names = ("retain_perturbed", "real_authors_perturbed", "world_facts_perturbed", f"{split}_perturbed")
    tasks = ("eval_log", "eval_real_author_wo_options", "eval_real_world_wo_options", "eval_log_forget")
    bases = ("paraphrased_answer", "answer", "answer", "paraphrased_answer")
    room = {"max_length": kwargs.pop("max_length", 200), "max_new_tokens": kwargs.pop("max_new_tokens", None)}
    prepared = []
    for name, task, base in zip(names, tasks, bases, strict=True):
        keys = ("question", "answer", base, "perturbed_answer")
        rows = data_module.load_rows(str(data_path), name, keys, ds_size)
        prepared.append(sets.prepare(sets.EvalSet(task, rows, *keys), tokenizer, model_family, **room))
    evaluator.evaluate(
        loading.load(str(path)),
        tokenizer,
        prepared,
        folder,
        **{"batch_size": 30, "page": page.evaluation_page, **kwargs},
    )
    return json.loads((folder / logs.AGGREGATED).read_text())


def error_of(done) -> str:
    """The one line that a refused run says."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode != 0 and len(lines) == 1, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    return lines[0]


def items():
    """Four pairs of samples of several lengths, the last a filler of an uneven batch."""
    drawn = [sample for seed in range(4) for samples in rows(seed) for sample in samples[:2]]
    parts = {"forget": drawn[:4], "retain": drawn[8:12], "idk": drawn[16:20]}
    return [({name: part[i] for name, part in parts.items()}, float(i < 3)) for i in range(4)]


def gentle(term):
    """Numbers with which a random model's gradient is large enough to be compared."""
    args = {"simnpo": {"beta": 0.2}, "satimp": {"beta1": 0.1, "beta2": 0.1}, "wga": {"beta": 0.1}}
    return args.get(term.function.__name__, {})


def prepared(name, method):
    terms = objective.finetuning().terms
    if method != "finetune":
        terms = objective.terms_of(checked("forget", f"forget_loss={method}", *NEEDED.get(method, [])).forget_loss)
    terms = [dataclasses.replace(term, args={**term.args, **gentle(term)}) for term in terms]
    model, reference = make(name), make(name)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    if any(term.contract.states for term in terms):
        rmu.train_only(model, 0, 1)
    samples = items()
    everything = sorted({sample for parts, _ in samples for sample in parts.values()})
    logps = references.reference_logps(reference, everything, 3, False)
    return model, reference, terms, samples, logps
