"""Finetune a model on one split: `full` makes the model to unlearn, `retain90` the retain model for forget10.

python finetune.py model_family=tiny data_path=data/mini split=full
torchrun --nproc_per_node=2 finetune.py --config-name=finetune.yaml split=full batch_size=4 model_family=phi lr=2e-5
python finetune.py --config-name=finetune_lora.yaml -m split=full,retain90 model_family=phi
"""

from typing import Any

from omegaconf import DictConfig

from tofu.cli import checks, command_line, schema
from tofu.models import families
from tofu.runtime import libraries, ranks


@command_line.entry("finetune", after=ranks.release)
def main(cfg: DictConfig) -> dict[str, Any]:
    """Run one job. Returns its scores."""
    cfg = checks.check(cfg, schema.Finetune)
    libraries.load_trainer()  # here, so that a refused command line does not wait for the heavy libraries
    from tofu.methods import objective
    from tofu.training.job import Job

    job = Job(cfg, families.family(cfg.model_family).hf_key, "model_family", objective.finetuning())
    job.read()
    job.check()
    if cfg.dry_run:
        return job.dry_run()
    job.start()
    trainer = job.trainer()
    return job.finish(trainer, job.fit(trainer))


if __name__ == "__main__":
    main()
