"""Make a finetuned model forget one split.

python forget.py model_family=tiny data_path=data/mini split=forget10 forget_loss=grad_diff
torchrun --nproc_per_node=2 forget.py --config-name=forget.yaml split=forget10 batch_size=4 model_family=phi lr=1e-5
python forget.py -m forget_loss=grad_ascent,grad_diff,KL split=forget01,forget05,forget10 model_family=phi
"""

import logging
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import command_line
import data_module
import dataloader
import evaluate_util
import models
import optimisation
import ranks
import references
import schema
import scoring
import utils

log = logging.getLogger(__name__)


@command_line.entry("forget", after=ranks.release)
def main(cfg: DictConfig) -> None:
    """Run one job."""
    cfg = schema.check(cfg, schema.Forget)
    family = schema.family(cfg.model_family)
    path = models.resolve(cfg.model_path, "model_path")
    tokenizer = models.load_tokenizer(path, family.end_token)
    terms = dataloader.objective(cfg.forget_loss)
    data = training_set(cfg, tokenizer, dataloader.parts_of(terms))
    states = any(term.contract.states for term in terms)
    engine = models.engine(cfg.engine, cfg.ds_config, cfg.precision)
    evaluates = cfg.eval_only or cfg.eval_while_train
    if cfg.eval_only:
        models.check_loadable(path, engine)
    else:
        attention = dataloader.check_trainable(cfg, family, path, engine, states)
    evaluator = evaluate_util.Evaluator(cfg.eval, tokenizer, cfg.forget_loss.name, "eval.") if evaluates else None
    if cfg.eval_only:
        out = utils.start_run(cfg, cfg.save_dir, overwrite=cfg.overwrite_dir, inputs=(path,))
        model = models.load_frozen(path, engine)
        return utils.finish_run(out, evaluator(model, out / "checkpoint-0", engine.sharded))
    args = optimisation.arguments(
        cfg.save_dir,
        samples=len(data),
        engine=engine,
        gradient_checkpointing=family.gradient_checkpointing,
        **{key: cfg[key] for key in optimisation.ARGUMENTS},
    )
    keep = (utils.REFERENCE,) if "logp" in dataloader.needs_of(terms) else ()
    read = (path, *([utils.find(cfg.forget_loss.alternates)] if "alternates" in cfg.forget_loss else []))
    out = utils.start_run(cfg, cfg.save_dir, overwrite=cfg.overwrite_dir, inputs=read, keep=keep)
    compares = references.of_run(out, cfg, path, engine, attention, data, terms)
    model = dataloader.load_model(path, engine, cfg.LoRA, attention, cfg.optim)
    dual = dataloader.dual_of(cfg.forget_loss, args)
    trainer = dataloader.TofuTrainer(
        model=model,
        args=args,
        train_dataset=data,
        terms=terms,
        packing=cfg.packing,
        dual=dual,
        gradient_norms=cfg.log_gradient_norms,
        **compares,
        **(steer(out, model, cfg) if states else {}),
        **optimisation.stochastic(cfg.optim, args),
    )
    if evaluator is not None:
        at_step = lambda step: evaluator(trainer.model, out / f"checkpoint-{step}", engine.sharded)  # noqa: E731
        trainer.add_callback(dataloader.EachEpoch(at_step))
    trained = dataloader.fit(trainer)
    if cfg.save_model:
        away = {"start": path, "alpha": cfg.forget_loss.negate} if "negate" in cfg.forget_loss else None
        models.save(trainer.model, tokenizer, out, bf16=engine.bf16, away=away)
    left = {} if dual is None else {"dual": dual.value}
    scores = evaluator.scores if evaluator is not None else {}
    utils.finish_run(out, {**trained, **left, **scores})


def steer(out: Path, model: PreTrainedModel, cfg: DictConfig) -> dict[str, Any]:
    """For terms on hidden states: freeze all but the method's layers, and draw the control vector and keep it."""
    config = model.config.get_text_config()
    block = scoring.block_at(config, cfg.forget_loss.depth)
    scoring.train_only(model, block, cfg.forget_loss.blocks)
    control = scoring.control_vector(config.hidden_size, cfg.seed)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    log.info(
        "the output of block %d of %d is steered; only these train: %s", block + 1, config.num_hidden_layers, trained
    )
    if ranks.rank() == 0:
        utils.write_json(out / utils.CONTROL, {"block": block, "trained": trained, "vector": control.tolist()})
    return {"block": block, "control_vector": control}


def training_set(cfg: DictConfig, tokenizer: PreTrainedTokenizerBase, parts: list[str]) -> data_module.TrainingSet:
    """The forget rows with what else the objective's parts ask for."""
    columns = ("question", "answer")
    forget, alternates = data_module.load_rows(cfg.data_path, cfg.split, columns), None
    if "alternates" in cfg.forget_loss:
        forget, alternates = data_module.load_alternates(cfg.forget_loss.alternates, forget)
    return data_module.TrainingSet(
        tokenizer,
        schema.family(cfg.model_family),
        cfg.max_length,
        cfg.seed,
        forget=forget,
        retain=data_module.load_rows(cfg.data_path, cfg.retain_split, columns) if "retain" in parts else None,
        refusals=data_module.load_refusals() if "idk" in parts and alternates is None else None,
        alternates=alternates,
    )


if __name__ == "__main__":
    main()
