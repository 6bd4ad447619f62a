"""The typed configs: a dataclass for each YAML in config/. What may stand in them is looked at in checks.py."""

from dataclasses import dataclass, field
from typing import Any, get_type_hints

from omegaconf import MISSING, OmegaConf

import utils
from tofu.models import families

CONFIG_DIR = utils.REPO / "config"
ENGINES = ("auto", "ddp", "deepspeed", "fsdp")
PRECISIONS = ("auto", "fp32", "bf16")
ATTENTIONS = ("auto", "sdpa", "eager", "varlen", "flash_attention_2", "flex_attention")
STOCHASTIC = "adamw_8bit_stochastic"  # an optimiser beside transformers' own: `optimisation.stochastic`


@dataclass
class Adapters:
    """LoRA's keys."""

    r: int = MISSING
    alpha: float = MISSING
    dropout: float = MISSING
    quantize: str | None = None


@dataclass
class Run:
    """What finetune.yaml and forget.yaml share. checkpoint_every is a text or a number, resume auto or false."""

    model_family: str = MISSING
    LoRA: Adapters = field(default_factory=Adapters)
    data_path: str = MISSING
    split: str = MISSING
    question_key: str = MISSING
    answer_key: str = MISSING
    batch_size: int = MISSING
    gradient_accumulation_steps: int = MISSING
    num_epochs: int = MISSING
    lr: float = MISSING
    weight_decay: float = MISSING
    max_grad_norm: float = MISSING
    optim: str = MISSING
    max_length: int = MISSING
    packing: bool = MISSING
    attention: str = MISSING
    torch_compile: bool = MISSING
    liger_kernel: bool = MISSING
    seed: int = MISSING
    engine: str = MISSING
    ds_config: str = MISSING
    precision: str = MISSING
    logging_steps: int = MISSING
    report_to: Any = MISSING
    objective: Any = None
    progress: bool = MISSING
    checkpoint_every: Any = MISSING
    resume: Any = MISSING
    save_total_limit: int = MISSING
    verify: str = MISSING
    allow_pickle: bool = MISSING
    overwrite_dir: bool = MISSING
    dry_run: bool = MISSING
    save_dir: str = MISSING


@dataclass
class Finetune(Run):
    """finetune.yaml."""


@dataclass
class ForgetLoss:
    """A file of config/forget_loss/: the keys that every method has. A class that it names has keys of its own."""

    name: str = MISSING
    forget: str = MISSING
    forget_args: dict[str, Any] = field(default_factory=dict)
    forget_weight: float = MISSING
    retain: str | None = None
    retain_args: dict[str, Any] = field(default_factory=dict)
    retain_weight: float = MISSING
    by_split: dict[str, Any] | None = None
    lr: float = MISSING
    num_epochs: int = MISSING


@dataclass
class Generation:
    """What generates, and how long an evaluation's generations may be, in tokens."""

    max_length: int = MISSING
    max_new_tokens: int | None = None
    backend: str = MISSING


@dataclass
class Rouge:
    """How an evaluation's texts are cut into words."""

    tokenizer: str = MISSING


@dataclass
class Fluency:
    """What says whether generations are fluent."""

    by: str = MISSING
    classifier: str = MISSING
    model: str | None = None


@dataclass
class Collapse:
    """Below which shares of the starting model's, and above which share of repeating texts, a model has collapsed."""

    utility: float = MISSING
    fluency: float = MISSING
    repeat: float = MISSING


@dataclass
class Holdout:
    """The non-members of membership inference. A list as path means the forget set's entry."""

    path: Any = MISSING
    split: str = MISSING


@dataclass
class Evaluate:
    """The lists hold one entry per set; a string means a list of equal ones, so their type here is Any.

    batch_size is a number or `auto`; retain_result a path, `auto`, or a path for each split.
    """

    model_family: str = MISSING
    model_path: str | None = None
    split: str = MISSING
    data_path: Any = MISSING
    split_list: Any = MISSING
    question_key: Any = MISSING
    answer_key: Any = MISSING
    base_answer_key: Any = MISSING
    perturbed_answer_key: Any = MISSING
    eval_task: Any = MISSING
    generation: Generation = field(default_factory=Generation)
    rouge: Rouge = field(default_factory=Rouge)
    ds_size: int | None = None
    batch_size: Any = MISSING
    engine: str = MISSING
    ds_config: str = MISSING
    precision: str = MISSING
    save_generated_text: bool = MISSING
    overwrite: bool = MISSING
    use_pretrained: bool = MISSING
    reinitialize_weights: bool = MISSING
    fluency: Fluency = field(default_factory=Fluency)
    collapse: Collapse = field(default_factory=Collapse)
    retain_result: Any = None
    oracle: str | None = None
    start_result: str | None = None
    truth_ratio: str = MISSING
    save_format: Any = MISSING
    metrics: Any = MISSING
    compat: str | None = None
    holdout: Holdout = field(default_factory=Holdout)
    reference_model: str | None = None
    verify: str = MISSING
    allow_pickle: bool = MISSING
    progress: bool = MISSING
    save_dir: str = MISSING


NOT_PARALLEL = ("save_format", "batch_size", "metrics", "retain_result")
PARALLEL = tuple(key for key, hint in get_type_hints(Evaluate).items() if hint is Any and key not in NOT_PARALLEL)
TRUTH_RATIOS = ("geometric", "arithmetic")
SAVE_FORMATS = ("tofu", "openunlearning")
COMPATS = ("openunlearning",)
ROUGE_TOKENIZERS = ("default", "unicode")


@dataclass
class KeepBest:
    """Which epoch's weights are saved; metric null: the last one's."""

    metric: str | None = None
    direction: str | None = None
    constraint: str | None = None


@dataclass
class StopOn:
    """What ends a training at an epoch's end; budget in nats per token."""

    collapse: bool = MISSING
    budget: float | None = None


@dataclass
class Forget(Run):
    """forget.yaml."""

    model_path: str | None = None
    retain_split: str | None = None
    allow_overlap: bool = MISSING
    forget_loss: ForgetLoss = field(default_factory=ForgetLoss)
    log_gradient_norms: bool = MISSING
    save_model: bool = MISSING
    eval_while_train: bool = MISSING
    evaluate: str | None = None
    keep_best: KeepBest = field(default_factory=KeepBest)
    stop_on: StopOn = field(default_factory=StopOn)
    eval_only: bool = MISSING
    eval: Evaluate = field(default_factory=Evaluate)


@dataclass
class Aggregate:
    """aggregate_eval_stat.yaml."""

    retain_result: str = MISSING
    ckpt_result: str = MISSING
    method_name: str = MISSING
    submitted_by: str = MISSING
    save_file: str = MISSING
    overwrite: bool = MISSING
    truth_ratio: str = MISSING


@dataclass
class Compare:
    """compare.yaml. results is a list of two, so its type here is Any."""

    results: Any = MISSING
    save_file: str | None = None


@dataclass
class Report:
    """report.yaml. What may be one or a list has the type Any."""

    results: Any = MISSING
    retain_result: Any = None
    start_result: str | None = None
    group_by: Any = None
    metrics: Any = None
    baseline: str | None = None
    intervals: bool = MISSING
    format: Any = MISSING
    truth_ratio: str = MISSING
    save_dir: str = MISSING


REPORT_FORMATS = ("csv", "md", "tex", "svg", "png", "pdf", "html")


OmegaConf.register_new_resolver("home", families.home, replace=True)  # where a run is saved unless save_dir says so
