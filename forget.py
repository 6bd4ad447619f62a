"""Make a finetuned model forget one split.

python forget.py model_family=tiny data_path=data/mini split=forget10 forget_loss=grad_diff lr=2e-4 num_epochs=10
torchrun --nproc_per_node=2 forget.py --config-name=forget.yaml split=forget10 batch_size=4 model_family=phi lr=1e-5
python forget.py -m forget_loss=grad_ascent,grad_diff,KL split=forget01,forget05,forget10 model_family=phi
"""

from typing import Any

from omegaconf import DictConfig

from tofu.cli import checks, command_line, schema
from tofu.runtime import libraries, ranks


@command_line.entry("forget", after=ranks.release)
def main(cfg: DictConfig) -> dict[str, Any]:
    """Run one job. Returns its scores, which a sweeper may optimise."""
    cfg = checks.check(cfg, schema.Forget)
    libraries.load_trainer()  # here, so that a refused command line does not wait for the heavy libraries
    from tofu.methods import objective
    from tofu.training.job import Job

    job = Job(cfg, cfg.model_path, "model_path", objective.method_of(cfg.forget_loss))
    job.read()
    if cfg.eval_only:
        return job.evaluate_only()
    job.check()
    if cfg.dry_run:
        return job.dry_run()
    job.start()
    trainer = job.trainer()
    return job.finish(trainer, job.fit(trainer))


if __name__ == "__main__":
    main()
