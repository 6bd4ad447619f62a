"""Make a finetuned model forget one split.

python forget.py model_family=tiny data_path=data/mini split=forget10 forget_loss=grad_diff
torchrun --nproc_per_node=2 forget.py --config-name=forget.yaml split=forget10 batch_size=4 model_family=phi lr=1e-5
python forget.py -m forget_loss=grad_ascent,grad_diff,KL split=forget01,forget05,forget10 model_family=phi
"""

from omegaconf import DictConfig
from transformers import PreTrainedTokenizerBase

import data_module
import dataloader
import evaluate_util
import models
import schema
import utils


@schema.entry("forget", after=models.release)
def main(cfg: DictConfig) -> None:
    """Run one job."""
    cfg = schema.check(cfg, schema.Forget)
    family = schema.family(cfg.model_family)
    path = models.resolve(cfg.model_path, "model_path")
    tokenizer = models.load_tokenizer(path, family.end_token)
    terms = dataloader.objective(cfg.forget_loss)
    data = training_set(cfg, tokenizer, dataloader.parts_of(terms))
    engine = "ddp" if cfg.eval_only else dataloader.resolve_engine(cfg.engine)
    args = dataloader.arguments(
        cfg.save_dir,
        samples=len(data),
        engine=engine,
        gradient_checkpointing=family.gradient_checkpointing,
        **{key: cfg[key] for key in dataloader.ARGUMENTS},
    )
    evaluates = cfg.eval_only or cfg.eval_while_train
    evaluator = evaluate_util.Evaluator(cfg.eval, tokenizer, cfg.forget_loss.name) if evaluates else None

    out = utils.start_run(cfg, cfg.save_dir, overwrite=cfg.overwrite_dir, inputs=(path,))
    model = dataloader.load_model(path, engine, cfg.precision, cfg.LoRA, family.attention)
    if cfg.eval_only:
        scores = evaluator(model.to(args.device), out / "checkpoint-0")
        return utils.finish_run(out, scores)
    needs_copy = dataloader.needs_reference(terms) and not cfg.LoRA.r  # with LoRA it is the model, adapters off
    trainer = dataloader.TofuTrainer(
        model=model,
        args=args,
        train_dataset=data,
        terms=terms,
        reference=dataloader.load_reference(path, engine, args, family.attention) if needs_copy else None,
    )
    if evaluator is not None:
        sharded = dataloader.is_sharded(engine)
        at_step = lambda step: evaluator(trainer.model, out / f"checkpoint-{step}", sharded)  # noqa: E731
        trainer.add_callback(dataloader.EachEpoch(at_step))
    result = trainer.train()
    trainer.save_state()
    if cfg.save_model:
        models.save(trainer.model, tokenizer, out, bf16=args.bf16)
    scores = evaluator.scores if evaluator is not None else {}
    utils.finish_run(out, {"train_loss": result.training_loss, "seconds": result.metrics["train_runtime"], **scores})


def training_set(cfg: DictConfig, tokenizer: PreTrainedTokenizerBase, parts: list[str]) -> data_module.TrainingSet:
    """The forget rows with what else the objective's parts ask for."""
    columns = ("question", "answer")
    return data_module.TrainingSet(
        tokenizer,
        schema.family(cfg.model_family),
        cfg.max_length,
        cfg.seed,
        forget=data_module.load_rows(cfg.data_path, cfg.split, columns),
        retain=data_module.load_rows(cfg.data_path, cfg.retain_split, columns) if "retain" in parts else None,
        refusals=data_module.load_refusals() if "idk" in parts else None,
    )


if __name__ == "__main__":
    main()
