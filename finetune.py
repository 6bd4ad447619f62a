"""Finetune a model on one split: `full` makes the model to unlearn, `retain90` and its like the reference (oracle).

python finetune.py model_family=tiny data_path=data/mini split=full
torchrun --nproc_per_node=2 finetune.py --config-name=finetune.yaml split=full batch_size=4 model_family=phi lr=2e-5
python finetune.py --config-name=finetune_lora.yaml -m split=full,retain90 model_family=phi
"""

from omegaconf import DictConfig

import command_line
import data_module
import dataloader
import models
import optimisation
import ranks
import schema
import utils


@command_line.entry("finetune", after=ranks.release)
def main(cfg: DictConfig) -> None:
    """Run one job."""
    cfg = schema.check(cfg, schema.Finetune)
    family = schema.family(cfg.model_family)
    rows = data_module.load_rows(cfg.data_path, cfg.split, ("question", "answer"))
    path = models.resolve(family.hf_key, "model_family")
    tokenizer = models.load_tokenizer(path, family.end_token)
    data = data_module.TrainingSet(tokenizer, family, cfg.max_length, cfg.seed, retain=rows)
    engine = models.engine(cfg.engine, cfg.ds_config, cfg.precision)
    attention = dataloader.check_trainable(cfg, family, path, engine)
    args = optimisation.arguments(
        cfg.save_dir,
        samples=len(data),
        engine=engine,
        gradient_checkpointing=family.gradient_checkpointing,
        **{key: cfg[key] for key in optimisation.ARGUMENTS},
    )
    out = utils.start_run(cfg, cfg.save_dir, overwrite=cfg.overwrite_dir, inputs=(path,))
    model = dataloader.load_model(path, engine, cfg.LoRA, attention, cfg.optim)
    trainer = dataloader.TofuTrainer(
        model=model,
        args=args,
        train_dataset=data,
        terms=dataloader.FINETUNE,
        packing=cfg.packing,
        **optimisation.stochastic(cfg.optim, args),
    )
    trained = dataloader.fit(trainer)
    models.save(trainer.model, tokenizer, out, bf16=engine.bf16)
    utils.finish_run(out, trained)


if __name__ == "__main__":
    main()
