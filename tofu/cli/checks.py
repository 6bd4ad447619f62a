"""What a config may hold: what can be refused before anything is loaded is refused here.

Everything but a method's losses and its own keys is looked at without importing torch.
"""

import copy
import logging
import os
import re
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, ListConfig, OmegaConf, SCMode
from omegaconf.errors import OmegaConfBaseException

import utils
from tofu.cli import epochs, names, oracle, report_keys
from tofu.cli.schema import (
    ATTENTIONS,
    COMPATS,
    ENGINES,
    PARALLEL,
    PRECISIONS,
    ROUGE_TOKENIZERS,
    SAVE_FORMATS,
    STOCHASTIC,
    TRUTH_RATIOS,
    Aggregate,
    Compare,
    Evaluate,
    Finetune,
    Forget,
    ForgetLoss,
    Report,
)
from tofu.evaluation import vllm_backend
from tofu.models import families
from tofu.runtime import ranks, resumption, trust
from utils import BadInput, choice, no_key, one_line

log = logging.getLogger(__name__)


def check(cfg: DictConfig, kind: type) -> DictConfig:
    """A composed config, typed as `kind`, resolved, normalised and read-only.

    Raises:
        BadInput: one line that names the key, the value and what is allowed.
    """
    if kind in (Forget, Evaluate):
        cfg = _with_family(cfg)
    try:
        plain = OmegaConf.to_container(cfg, resolve=True)
        own = _own_keys(plain)
        _fit(kind, plain)
        typed = OmegaConf.merge(OmegaConf.structured(kind), plain)
        missing = OmegaConf.missing_keys(typed) | OmegaConf.missing_keys(cfg)
        if missing := sorted(missing - {f"forget_loss.{key}" for key in own}):
            are = "is" if len(missing) == 1 else "are"
            raise BadInput(f"{', '.join(missing)} {are} missing: give {' '.join(f'{key}=...' for key in missing)}")
    except OmegaConfBaseException as error:
        raise BadInput(told(error)) from None
    checked = OmegaConf.create(OmegaConf.to_container(typed, structured_config_mode=SCMode.DICT))
    for key in ("save_dir", "save_file", "eval.save_dir"):
        if OmegaConf.select(checked, key) is not None:  # no shell expands the ~ in save_dir=~/x
            OmegaConf.update(checked, key, os.path.expanduser(OmegaConf.select(checked, key)))
    CHECKS[kind](checked)
    _check_splits(checked)
    if kind is Forget:  # last, since it imports the losses
        _check_method(checked, own)
    OmegaConf.set_readonly(checked, True)
    return checked


def _with_family(cfg: DictConfig) -> DictConfig:
    """The config with the family that its model tells where it names none, before an interpolation reads it."""
    if "model_family" not in cfg or OmegaConf.is_missing(cfg, "model_family") or cfg.model_family is not None:
        return cfg
    cfg = copy.deepcopy(cfg)
    path = None if cfg.get("use_pretrained") else OmegaConf.select(cfg, "model_path", throw_on_missing=False)
    cfg.model_family = families.of_model(path)
    log.info("model_family=%s, as %s says", cfg.model_family, path)
    return cfg


def _check_splits(cfg: DictConfig) -> None:
    """Raise BadInput for a split that a local folder of JSON or CSV files does not have; others are found when read."""
    asked = [] if "split_list" in cfg or "split" not in cfg else [(cfg.data_path, cfg.split)]
    evaluated = cfg if "split_list" in cfg else cfg.get("eval", {})
    if evaluated is cfg or any(map(cfg.get, ("eval_only", "eval_while_train", "evaluate"))):
        asked += zip(evaluated.data_path, evaluated.split_list, strict=True)
        if evaluated.holdout.split != "auto":
            _check_split(evaluated.holdout.path, evaluated.holdout.split, "holdout.split")
    for data_path, split in asked:
        _check_split(data_path, split)


def _check_split(data_path: str, split: str, key: str = "split") -> None:
    if not utils.is_local(data_path):
        utils.check_place(data_path, "data_path")
    names = utils.local_splits(data_path)
    if names is not None and split not in names:
        raise BadInput(utils.no_split(data_path, split, names, key))


def _own_keys(plain: dict[str, Any]) -> dict[str, Any]:
    """Take the keys out of `forget_loss` that the schema does not have: the method's class, and that class's own."""
    method = plain.get("forget_loss")
    if not isinstance(method, dict):
        return {}
    return {key: method.pop(key) for key in list(method) if key not in get_type_hints(ForgetLoss)}


WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}


def _fit(kind: type, values: dict[str, Any], prefix: str = "") -> None:
    """Raise BadInput unless every value has a place in the dataclass `kind`, and that place's type."""
    hints, typed = get_type_hints(kind), OmegaConf.structured(kind)
    lost = [f"{prefix}{key}" for key, value in values.items() if value is None and hints.get(key) is str]
    if len(lost) > 1:
        raise BadInput(f"{', '.join(lost)} are missing: give {' '.join(f'{key}=...' for key in lost)}")
    for key, value in sorted(values.items(), key=lambda item: isinstance(item[1], dict)):
        full = f"{prefix}{key}"
        if key not in hints:
            raise BadInput(no_key(full, [f"{prefix}{name}" for name in hints]))
        hint = hints[key]
        group = is_dataclass(hint) or get_origin(hint) is dict
        if group and not isinstance(value, dict):
            names = [f"{full}.{name}" for name in get_type_hints(hint)] if is_dataclass(hint) else [f"{full}.NAME"]
            raise BadInput(f"{full}={value}: it is a group of keys, {', '.join(names)}")
        if is_dataclass(hint):
            _fit(hint, value, f"{full}.")
            continue
        try:
            typed[key] = value
        except OmegaConfBaseException:
            said = f"{full} is missing" if value is None else f"{full}={value}"
            raise BadInput(f"{said}: it must be {_words(hint)}") from None


def _words(hint: Any) -> str:
    return " or ".join(WORDS.get(one, "a group of keys") for one in get_args(hint) or (hint,))


def told(error: BaseException) -> str:
    """What a resolver of ours refused where that is behind an error of OmegaConf's; else that error's own line."""
    behind: BaseException | None = error
    while behind is not None and not isinstance(behind, BadInput):
        behind = behind.__cause__ or behind.__context__
    return one_line(behind or error)


def _check_run(cfg: DictConfig) -> None:
    families.family(cfg.model_family)
    _check_engine(cfg)
    utils.at_least(cfg, 1, "batch_size", "gradient_accumulation_steps", "num_epochs", "logging_steps")
    utils.at_least(cfg, 2, "max_length")
    utils.at_least(cfg, 0, "lr", "LoRA.alpha", above=True)
    utils.at_least(cfg, 0, "weight_decay", "max_grad_norm", "LoRA.r", "LoRA.dropout", "seed")
    if cfg.seed >= 2**32:
        raise BadInput(f"seed={cfg.seed}: it must be below 2**32")
    if cfg.LoRA.dropout >= 1:
        raise BadInput(f"LoRA.dropout={cfg.LoRA.dropout}: it must be below 1")
    resumption.check(cfg)
    choice("attention", cfg.attention, ATTENTIONS)
    names.check_objective(cfg.objective)
    if cfg.LoRA.quantize not in (None, "4bit"):
        raise BadInput(f"LoRA.quantize={cfg.LoRA.quantize}: it may be 4bit or null")
    if cfg.LoRA.quantize and not cfg.LoRA.r:
        raise BadInput("LoRA.quantize=4bit trains adapters on a base in four bits: give them a rank, LoRA.r=8 say")
    if cfg.optim == STOCHASTIC and cfg.LoRA.r:
        raise BadInput(f"optim={STOCHASTIC} is for bf16 weights, and adapters are float32: take optim=auto")


def _check_engine(cfg: DictConfig, prefix: str = "") -> None:
    choice(f"{prefix}engine", cfg.engine, ENGINES)
    choice(f"{prefix}precision", cfg.precision, PRECISIONS)
    choice(f"{prefix}verify", cfg.verify, trust.VERIFY)
    if cfg.engine == "fsdp" and ranks.world_size() < 2:
        raise BadInput(
            f"{prefix}engine=fsdp shards a model over processes and there is 1: start it with torchrun, or engine=ddp"
        )
    if not os.path.isfile(utils.find(cfg.ds_config)):
        raise BadInput(
            f"{prefix}ds_config={cfg.ds_config}: no such file; config/ds_config.json (ZeRO-3) and "
            "config/ds_config_zero2.json are there"
        )


def _check_forget(cfg: DictConfig) -> None:
    _check_run(cfg)
    method = cfg.forget_loss
    utils.at_least(cfg, 0, "forget_loss.forget_weight", "forget_loss.retain_weight")
    names.check_method(method.name)
    if cfg.eval_only and (cfg.LoRA.quantize or cfg.attention != "auto"):
        raise BadInput("eval_only=true evaluates the model as it is: leave out LoRA.quantize and attention")
    cfg.model_path = _model_path(cfg.model_path, cfg.model_family, cfg.data_path)
    method.lr, method.num_epochs = cfg.lr, cfg.num_epochs  # the record has one answer
    if cfg.eval_only and cfg.dry_run:
        raise BadInput("dry_run=true estimates a training, and eval_only=true trains nothing: leave one of them out")
    if cfg.retain_split is not None:  # also where the method does not read it
        _check_split(cfg.data_path, cfg.retain_split, "retain_split")
    cfg.retain_split = cfg.retain_split or _retain_split(cfg.split)
    if cfg.eval.model_path is None:
        cfg.eval.model_path = cfg.model_path
    _check_followers(cfg)
    if cfg.eval_while_train or cfg.evaluate:
        asked = "eval_while_train=true" if cfg.eval_while_train else f"evaluate={cfg.evaluate}"
        why_not = f"reads a model from its folder, and {asked} evaluates the one in memory"
        vllm_backend.check_asked(cfg.eval.generation.backend, "eval.", why_not=why_not)
    _check_evaluate(cfg.eval, prefix="eval.")
    epochs.check(cfg)


def _check_method(cfg: DictConfig, own: dict[str, Any]) -> None:
    """The losses that a method names, their hyper-parameters, and the keys of its own class, which join the config.

    Args:
        own: the keys of `forget_loss` that the schema does not have.
    """
    from tofu.methods import losses, objective

    method = cfg.forget_loss
    del method["by_split"]  # what it led to stands elsewhere
    for part, table in (("forget", losses.FORGET), ("retain", losses.RETAIN)):
        name, args = method[part], method[f"{part}_args"]
        wanted = objective.contract_of(f"forget_loss.{part}", name).args if name is not None else ()
        if sorted(wanted) != sorted(args):
            raise BadInput(f"forget_loss.{part}_args={list(args)}: {name} takes {', '.join(wanted) or 'none'}")
        for key, hint in get_type_hints(table[name]).items() if wanted else ():
            if key in wanted and not isinstance(args[key], (*(get_args(hint) or (hint,)), int)):
                raise BadInput(f"forget_loss.{part}_args.{key}={args[key]}: it must be {_words(hint)}")
        utils.at_least(cfg, 0, f"forget_loss.{part}_args.beta", above=True)
        utils.at_least(cfg, 0, f"forget_loss.{part}_args.skip")
    kind = objective.class_of(own)
    method.update(_fit_own(method.name, kind.Keys, {key: value for key, value in own.items() if key != "class"}))
    if "class" in own:
        method["class"] = own["class"]
    objective.check_terms(cfg)
    kind.check(cfg)


def _fit_own(name: str, keys: type, own: dict[str, Any]) -> dict[str, Any]:
    """A method's own keys, typed as its class declares them.

    Raises:
        BadInput: a key that the class has not, or one that is missing or of another type.
    """
    for key in own:
        if key not in get_type_hints(keys):
            known = [one for one in (*get_type_hints(ForgetLoss), *get_type_hints(keys)) if one != "by_split"]
            raise BadInput(no_key(f"forget_loss.{key}", [f"forget_loss.{one}" for one in known], f" of {name}"))
    for one in fields(keys):
        if own.get(one.name) in (None, "???"):
            how = one.metadata.get("how")
            told = f"give forget_loss.{one.name}=..., {how}" if how else f"{name} needs ++forget_loss.{one.name}=..."
            raise BadInput(f"forget_loss.{one.name} is missing: {told}")
    _fit(keys, own, "forget_loss.")
    return OmegaConf.to_container(OmegaConf.merge(OmegaConf.structured(keys), own), structured_config_mode=SCMode.DICT)


# what a run and its own evaluations have in common, because it is the model in memory that is evaluated
FOLLOWERS = ("model_family", "model_path", "engine", "ds_config", "precision", "verify", "allow_pickle", "save_dir")


def _check_followers(cfg: DictConfig) -> None:
    """Raise BadInput where the command line says of eval.* what a run's own evaluations would ignore."""
    for key in FOLLOWERS:
        if cfg.eval[key] != cfg[key]:
            raise BadInput(f"eval.{key}={cfg.eval[key]}: eval.{key} follows {key}={cfg[key]}: set {key}")
    for key in ("use_pretrained", "reinitialize_weights"):
        if cfg.eval[key]:
            raise BadInput(f"eval.{key}=true: a run evaluates its own model; {key} belongs to evaluate_util.py alone")


def _retain_split(split: str) -> str:
    """retain90 for forget10: the splits' names say which rows complete each other."""
    found = utils.complement(split)
    if found is None or split.endswith("_perturbed"):
        raise BadInput(f"split={split}: forget01, forget05 or forget10; or name the rows to keep too: retain_split=...")
    return found


def _model_path(path: str | None, model_family: str, data_path: str) -> str:
    """The model to start from: what the user names, else the family's own, which a newcomer has yet to make."""
    if path:
        return path
    path = families.family(model_family).ft_model_path
    if path is not None and path.count("/") != 1 and not utils.is_local(path):
        raise BadInput(
            f"model_path is missing, and {model_family}'s own (its ft_model_path in config/model_config.yaml), {path}, "
            f"is not there yet: make it with python finetune.py model_family={model_family} data_path={data_path} "
            f"split=full save_dir={path} lr=... num_epochs=..., with numbers that suit it, or name another model_path"
        )
    if path is None:
        raise BadInput(
            f"model_path is missing and {model_family} has no ft_model_path: finetune first, then model_path=..."
        )
    return path


def _check_evaluate(cfg: DictConfig, prefix: str = "") -> None:
    families.family(cfg.model_family)
    _check_engine(cfg, prefix)
    utils.at_least(cfg, 1, "ds_size", "generation.max_new_tokens", prefix=prefix)
    utils.at_least(cfg, 2, "generation.max_length", prefix=prefix)
    if cfg.batch_size != "auto" and (type(cfg.batch_size) is not int or cfg.batch_size < 1):
        raise BadInput(f"{prefix}batch_size={cfg.batch_size}: it must be auto, or a whole number of at least 1")
    choice(f"{prefix}generation.backend", cfg.generation.backend, vllm_backend.BACKENDS)
    drawn = "reads a model from its folder, and reinitialize_weights=true draws weights"
    vllm_backend.check_asked(cfg.generation.backend, prefix, why_not=drawn if cfg.reinitialize_weights else None)
    if cfg.use_pretrained or (cfg.reinitialize_weights and cfg.model_path is None):
        cfg.model_path = families.family(cfg.model_family).hf_key
    if cfg.model_path is None:
        raise BadInput(
            f"{prefix}model_path is missing: name the model to evaluate, model_path=... (or use_pretrained=true)"
        )
    choice(f"{prefix}truth_ratio", cfg.truth_ratio, TRUTH_RATIOS)
    choice(f"{prefix}rouge.tokenizer", cfg.rouge.tokenizer, ROUGE_TOKENIZERS)
    if not isinstance(cfg.save_format, ListConfig):
        cfg.save_format = [cfg.save_format]
    for name in cfg.save_format:
        choice(f"{prefix}save_format", name, SAVE_FORMATS)
    _check_metrics(cfg, prefix)
    cfg.split = _perturbed(cfg.split)
    cfg.retain_result = oracle.resolve(cfg, prefix)
    sets = len(cfg.eval_task) if isinstance(cfg.eval_task, ListConfig) else 1
    for key in PARALLEL:
        if not isinstance(cfg[key], ListConfig):
            cfg[key] = [cfg[key]] * sets
        if any(entry is None or isinstance(entry, DictConfig | ListConfig) for entry in cfg[key]):
            raise BadInput(f"{prefix}{key}={cfg[key]}: it must be a text, or a list of one for each set")
        cfg[key] = [str(entry) for entry in cfg[key]]
        if len(cfg[key]) != sets:
            raise BadInput(
                f"{prefix}{key} has {len(cfg[key])} entries and {prefix}eval_task {sets}: the lists are parallel, one "
                "entry a set (or one string for all)"
            )
    cfg.split_list = [_perturbed(split) for split in cfg.split_list]
    names.check_tasks(list(cfg.eval_task), sets, prefix)
    _check_holdout(cfg, prefix)


def _check_holdout(cfg: DictConfig, prefix: str) -> None:
    from tofu.evaluation import logs  # it imports numpy

    place, tasks = cfg.holdout.path, list(cfg.eval_task)
    if isinstance(place, ListConfig) and len(place) == len(tasks):
        place = place[tasks.index(logs.FORGET) if logs.FORGET in tasks else -1]
    if not isinstance(place, str):
        raise BadInput(f"{prefix}holdout.path={place}: it must be one folder or hub id")
    cfg.holdout.path = place


def _check_metrics(cfg: DictConfig, prefix: str) -> None:
    from tofu.evaluation.metrics import fluency  # it imports numpy

    cfg.metrics = names.metrics(cfg.metrics, prefix)
    if cfg.compat is not None:
        choice(f"{prefix}compat", cfg.compat, COMPATS)
    choice(f"{prefix}fluency.by", cfg.fluency.by, fluency.BY)
    for key, share in cfg.collapse.items():
        if not 0 <= share <= 1:
            raise BadInput(f"{prefix}collapse.{key}={share}: it is a share, from 0 to 1")
    if cfg.reference_model is not None and not {"privacy", "mia_reference", "all"} & {*cfg.metrics}:
        raise BadInput(
            f"{prefix}reference_model={cfg.reference_model} is read by membership inference alone: add privacy to "
            f"{prefix}metrics"
        )


def _perturbed(split: str) -> str:
    """The evaluation rows of a forget split carry paraphrases and wrong answers: forget10 means forget10_perturbed."""
    return f"{split}_perturbed" if re.fullmatch(r"forget\d\d", split) else split


def _check_aggregate(cfg: DictConfig) -> None:
    choice("truth_ratio", cfg.truth_ratio, TRUTH_RATIOS)  # paths are looked at when they are read


def _check_compare(cfg: DictConfig) -> None:
    if not isinstance(cfg.results, ListConfig) or len(cfg.results) != 2 or not all(cfg.results):
        raise BadInput(f"results={cfg.results}: it must be a list of two evaluations, results=[A,B]")
    cfg.results = [str(path) for path in cfg.results]
    if cfg.save_file is not None and os.path.isdir(cfg.save_file):
        raise BadInput(f"save_file={cfg.save_file} is a folder: name the CSV to write")


CHECKS = {
    Finetune: _check_run,
    Forget: _check_forget,
    Evaluate: _check_evaluate,
    Aggregate: _check_aggregate,
    Compare: _check_compare,
    Report: report_keys.check,
}
