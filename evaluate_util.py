"""Evaluate a model on the four TOFU sets: per-row logs, then statistics of the logs.

python evaluate_util.py model_family=phi split=forget10_perturbed model_path=PATH
torchrun --nproc_per_node=2 evaluate_util.py model_family=phi split=forget10_perturbed model_path=PATH
python evaluate_util.py model_family=tiny data_path=data/mini model_path=runs/tiny/full retain_result=LOG
"""

from typing import Any

from omegaconf import DictConfig

from tofu.cli import checks, command_line, oracle, schema
from tofu.runtime import ranks

SEED = 42  # only reinitialize_weights draws anything


@command_line.entry("eval_everything", after=ranks.release)
def main(cfg: DictConfig) -> dict[str, Any]:
    """Evaluate one model from disk. Returns its scores, on rank 0."""
    cfg = checks.check(cfg, schema.Evaluate)
    oracle.make(cfg)
    from accelerate.utils import set_seed  # here, so that a refused command line does not wait for heavy libraries

    from tofu.evaluation import evaluator, vllm_backend
    from tofu.models import engines, folders, loadable, loading
    from tofu.reporting import page
    from tofu.runtime import peers, provenance, run_folder, stages, trained_on, trust

    trust.settle(cfg)
    stages.take()
    key = "model_family" if cfg.use_pretrained else "model_path"
    path = folders.resolve(cfg.model_path, key)
    tokenizer, family, record = folders.load_asked(path, cfg.model_family, key)
    taught = trained_on.NOTHING if cfg.use_pretrained or cfg.reinitialize_weights else trained_on.read(path)
    about = {"starts_from": provenance.started_from(path), "taught": taught}
    evaluate = evaluator.Evaluator(cfg, tokenizer, family, record, page.evaluation_page, **about)
    engine = engines.engine_of_evaluation(cfg.engine, cfg.ds_config, cfg.precision, path)
    vllm_backend.check(cfg.generation.backend, path)
    loadable.check_loadable(path, engine, weights=not cfg.reinitialize_weights)
    evaluate.check(engine)
    own = (*evaluator.OWN, *(f"{task}.json" for task in cfg.eval_task))
    keep = (*evaluator.KEPT, *(f"{task}.json" for task in cfg.eval_task))
    out = run_folder.start_evaluation(cfg, cfg.save_dir, overwrite=cfg.overwrite, own=own, keep=keep)
    peers.join()
    identity = folders.identity(path, random_weights=cfg.reinitialize_weights) if ranks.rank() == 0 else ""
    fingerprints = evaluate.fingerprints(identity, engine.bf16)
    todo, model, answers = evaluate.missing(out, fingerprints), None, None
    if todo:
        answers = evaluate.generated(path, engine.bf16, todo)
        evaluate.compare(out, engine, todo)
        set_seed(SEED)
        with stages.stage("loading"):
            model = loading.load_frozen(path, engine, random_weights=cfg.reinitialize_weights)
    run_folder.going_on(out)
    scores = evaluate(model, out, engine.sharded, fingerprints, todo, answers)
    run_folder.finish_run(out, {**scores, "family": record})
    return scores


if __name__ == "__main__":
    main()
