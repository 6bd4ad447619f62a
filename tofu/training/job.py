"""What a run of finetune.py and one of forget.py have in common, from the checked config to the saved model."""

import functools
import logging
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed
from omegaconf import DictConfig, OmegaConf
from transformers import PreTrainedModel

import data_module
import dataloader
from tofu.cli import oracle
from tofu.evaluation import evaluator, vllm_backend
from tofu.methods import objective, references
from tofu.methods.objective import Method
from tofu.models import engines, folders, loadable, loading, saving
from tofu.reporting import page
from tofu.runtime import peers, ranks, resumption, run_folder, signals, stages, trained_on, trust
from tofu.training import best, callbacks, checkpoints, disruption, forecast, optimisation
from utils import BadInput

log = logging.getLogger(__name__)


class Job:
    """One training run. Whatever can be refused is refused before `start` makes the run's folder.

    Attributes:
        path: the model that the run starts from, a folder or a hub id.
        data: the training samples; set by `read`.
        taught, taught_here: what the model was trained on before this run, and will have been after it.
        evaluator: evaluates the model in memory; None where the run does not evaluate.
        choice: how the best epoch is chosen; None where the last weights are saved.
        disruption: measures what `stop_on.budget` bounds; None where nothing does.
        epochs: what is done at each epoch's end, set by `trainer`; None where nothing is.
    """

    def __init__(self, cfg: DictConfig, path: str, key: str, method: Method) -> None:
        """Find the model and read its tokenizer.

        Args:
            cfg: the checked config.
            path, key: the model to start from, and the config key that names it.

        Raises:
            BadInput: no such model, no tokenizer that the suite can use, or a family with other tags than the model's.
        """
        trust.settle(cfg)
        stages.take()
        self.cfg, self.method = cfg, method
        self.path = folders.resolve(path, key)
        self.tokenizer, self.family, self.record = folders.load_asked(self.path, cfg.model_family, key)
        self.engine = engines.engine_of(cfg.engine, cfg.ds_config, cfg.precision)
        self.evaluator: evaluator.Evaluator | None = None
        self.choice: best.Choice | None = None
        self.disruption: disruption.Disruption | None = None
        self.epochs: callbacks.EachEpoch | None = None
        pretrained = key == "model_family"
        self.taught = trained_on.read(self.path, trained_on.NOTHING if pretrained else trained_on.UNKNOWN)

    def read(self) -> None:
        """Read and encode the rows that the method's terms ask for.

        Raises:
            BadInput: no such data, a row without a text or without room for its answer, or one to forget and to keep.
        """
        cfg, parts = self.cfg, objective.parts_of(self.method.terms)
        keys = (cfg.question_key, cfg.answer_key)
        sets: dict[str, Any] = {}
        if {"forget", "idk"} & set(parts):
            forget = data_module.load_pairs(cfg.data_path, cfg.split, *keys)
            sets["forget"], sets["alternates"] = self.method.rows(forget)
            if "idk" in parts and sets["alternates"] is None:
                sets["refusals"] = data_module.load_refusals()
        if "retain" in parts:
            split = cfg.retain_split if sets else cfg.split  # finetuning's only rows are those of its split
            sets["retain"] = data_module.load_pairs(cfg.data_path, split, *keys)
        if {"forget", "retain"} <= sets.keys() and not cfg.allow_overlap:
            data_module.check_apart(sets["forget"], sets["retain"], cfg.split, cfg.retain_split)
        rows = [row for name in ("forget", "retain") for row in sets.get(name, ())]
        self.taught_here = trained_on.joined(self.taught, (row["question"] for row in rows))
        self.data = data_module.TrainingSet(self.tokenizer, self.family, cfg.max_length, cfg.seed, **sets)

    def check(self) -> None:
        """Refuse a model that can't be trained as the config asks for, and settings that the Trainer would refuse.

        Of a run with `eval_while_train` the evaluation's sets are read; how much memory a step takes is said.

        Raises:
            BadInput: see `loadable.check_loadable`, `evaluates`, `optimisation.arguments` and `forecast.refuse`; also
                gradient norms where an engine shards the gradients.
        """
        cfg = self.cfg
        if cfg.get("log_gradient_norms") and self.engine.name != "ddp":
            raise BadInput(f"log_gradient_norms=true needs whole gradients, engine=ddp: it is {self.engine.name}")
        engines.warn_of_coarse_sums(self.engine, cfg.ds_config)
        self.attention = loadable.attention_of(
            self.path, self.engine, self.family, cfg.attention, packing=cfg.packing, compiled=cfg.torch_compile
        )
        keys = {"packing": cfg.packing, "quantize": cfg.LoRA.quantize, "liger_kernel": cfg.liger_kernel}
        states = any(term.contract.states for term in self.method.terms)
        loadable.check_loadable(self.path, self.engine, self.attention, states=states, weights=False, **keys)
        if cfg.get("eval_while_train") or cfg.get("evaluate"):
            self.evaluates(self.taught_here)
            self.choice = best.choice_of(cfg, self.evaluator.measured, self.path)
        self.disruption = disruption.of_run(cfg, self.data, self.tokenizer, self.family)
        checkpointing = self.family.gradient_checkpointing
        optim, self.forecast = forecast.of_run(
            cfg, self.path, self.engine, self.attention, self.data, self.method, checkpointing
        )
        if self.forecast is not None and not cfg.dry_run:
            log.info(forecast.line(self.forecast))
            forecast.refuse(self.forecast)
        if not cfg.dry_run:  # a hub model's weights are fetched now
            loadable.check_weights(self.path)
        self.args = optimisation.arguments(
            cfg.save_dir,
            samples=len(self.data),
            engine=self.engine,
            gradient_checkpointing=checkpointing,
            **{key: cfg[key] for key in optimisation.ARGUMENTS} | {"optim": optim},
        )
        self.args.run_name, self.args.tofu = Path(cfg.save_dir).name, OmegaConf.to_container(cfg)  # for trackers

    def dry_run(self) -> dict[str, Any]:
        """Say how much memory a step takes; no folder is made and no weight is read.

        Returns:
            The bytes by name.
        """
        if self.forecast is None:
            return {}  # why has been said
        log.info(forecast.table(self.forecast, self.cfg.model_family))
        return self.forecast.estimate._asdict()

    def evaluates(self, taught: trained_on.Taught) -> None:
        """Read and tokenise the evaluation's sets.

        Args:
            taught: what the model that is evaluated was trained on.

        Raises:
            BadInput: see `evaluator.Evaluator`.
        """
        cfg, named = self.cfg, (self.cfg.forget_loss.name, "eval.")
        if not cfg.dry_run:
            oracle.make(cfg.eval)
        self.evaluator = evaluator.Evaluator(
            *(cfg.eval, self.tokenizer, self.family, self.record, page.evaluation_page, *named, self.path),
            taught=taught,
        )
        self.evaluator.check(self.engine)

    def start(self) -> Path:
        """Make the run's folder, once `check` has found nothing.

        Raises:
            BadInput: see `run_folder.start_run`.
        """
        cfg, method = self.cfg, self.method
        method.start, method.num_epochs = self.path, cfg.num_epochs
        method.steps_per_epoch = optimisation.steps_per_epoch(
            len(self.data), cfg.batch_size * cfg.gradient_accumulation_steps
        )
        keep = (run_folder.REFERENCE,) if "logp" in objective.needs_of(method.terms) else ()
        read = (self.path, *method.reads())
        self.resume = resumption.Resume(str(cfg.resume).lower(), self._made_from(), checkpoints.kind(self.engine))
        self.out = run_folder.start_run(
            cfg, cfg.save_dir, overwrite=cfg.overwrite_dir, inputs=read, keep=keep, resume=self.resume
        )
        peers.join()
        return self.out

    def _made_from(self) -> dict[str, Any]:
        """What the weights follow from beside the keys; the first is what their batches come to."""
        cut = self.cfg.batch_size * self.cfg.gradient_accumulation_steps
        return {
            resumption.CUT: cut * ranks.world_size(),
            "optimiser": self.args.optim,
            "starting model": folders.quick_identity(self.path),
            "training data": checkpoints.data_digest(self.data),
        }

    def _plan(self) -> checkpoints.Plan:
        """When checkpoints are written; the one that the run goes on from is rank 0's choice."""
        cfg, resume = self.cfg, self.resume
        start = ranks.from_rank_0(resume.checkpoint) if ranks.world_size() > 1 else resume.checkpoint
        about = {**resume.made_from, "engine": resume.engine}
        every = resumption.interval(cfg.checkpoint_every)
        kept = {"evaluator": self.evaluator} if self.evaluator is not None else {}
        return checkpoints.Plan(self.out, every, cfg.save_total_limit, self.engine, about, start, kept)

    def trainer(self) -> dataloader.TofuTrainer:
        """Compute what the method needs of the reference model, load the model to train, and put it into a Trainer."""
        cfg, method = self.cfg, self.method
        weights = optimisation.weights_type(self.engine, cfg.LoRA, cfg.optim)
        with stages.stage("reference pass"):
            compares = references.of_run(
                self.out, cfg, self.path, self.engine, self.attention, self.data, method.terms, weights
            )
            if self.evaluator is not None:
                self.evaluator.compare(self.out, self.engine)
            if self.disruption is not None and compares["reference"] is None and not cfg.LoRA.r:
                start = functools.partial(loading.load_frozen, trained_in=weights, attention=self.attention)
                self.disruption.keep(lambda: start(self.path, self.engine), self.engine.sharded)
        model = self._load(weights)
        method.prepare(model, self.out, cfg.seed)
        trainer = checkpoints.Resumable(
            plan=self._plan(),
            model=model,
            args=self.args,
            train_dataset=self.data,
            method=method,
            packing=cfg.packing,
            gradient_norms=cfg.get("log_gradient_norms", False),
            **compares,
            **optimisation.stochastic(cfg.optim, self.args),
        )
        keep = None
        if self.choice is not None:
            keep = best.KeepBest(self.choice, lambda folder: self._save(trainer, folder), self.out)
        evaluate = None if self.evaluator is None else lambda step: self._evaluate_in(trainer, step)
        self.epochs = callbacks.add(cfg, trainer, evaluate, keep, self.disruption, self.engine.sharded)
        if self.epochs is not None:
            trainer.plan.kept["epochs"] = self.epochs
        run_folder.going_on(self.out)
        return trainer

    def _save(self, trainer: dataloader.TofuTrainer, folder: Path) -> None:
        """Save the model in memory as the run's would be; on every rank."""
        dataloader.settle(trainer)
        change = self.method.before_saving if objective.overrides(self.method, "before_saving") else None
        with stages.stage("saving"):
            saving.save(trainer.model, self.tokenizer, folder, bf16=self.engine.bf16, family=self.record, change=change)

    @stages.stage("loading")
    def _load(self, weights: Any) -> PreTrainedModel:
        """The model to train: all its weights, or adapters in float32 that are drawn from the seed."""
        lora = self.cfg.LoRA
        model = loading.load(
            self.path,
            attention=self.attention,
            dtype=weights,
            shard=self.engine.name == "fsdp",
            bf16_compute=self.engine.bf16,
            quantize=lora.quantize,
            device=loading.loading_device() if self.engine.name == "ddp" and not lora.quantize else None,
        )
        set_seed(self.cfg.seed)  # here, so that what was loaded and computed before does not move what is drawn
        return loading.add_lora(model, r=lora.r, alpha=lora.alpha, dropout=lora.dropout) if lora.r else model

    def _evaluate_in(self, trainer: checkpoints.Resumable, step: int) -> dict[str, Any]:
        try:
            return self.evaluate(trainer.model, step)
        except signals.Interrupted as stop:
            trainer.save_and_stop(stop)

    @stages.stage("training")
    def fit(self, trainer: dataloader.TofuTrainer) -> dict[str, float]:
        """Train (`dataloader.fit`)."""
        return dataloader.fit(trainer)

    def evaluate(self, model: PreTrainedModel, step: int, answers: Any = None) -> dict[str, Any]:
        """The scores of the model in memory; its logs go to checkpoint-STEP in the run's folder.

        Args:
            answers: what was generated beforehand (`Evaluator.generated`).
        """
        try:
            return self.evaluator(model, self.out / f"checkpoint-{step}", self.engine.sharded, answers=answers)
        except signals.Interrupted as stop:
            raise signals.Interrupted(self.out, f"evaluation at step {step}: {stop.saved}", step, stop.name) from None

    def evaluate_only(self) -> dict[str, Any]:
        """Evaluate the starting model as it is, into checkpoint-0.

        Raises:
            BadInput: see `loadable.check_loadable`, `vllm_backend` and `run_folder.start_run`.
        """
        cfg = self.cfg
        vllm_backend.check(cfg.eval.generation.backend, self.path, "eval.")
        self.engine = engines.engine_of_evaluation(cfg.engine, cfg.ds_config, cfg.precision, self.path)
        loadable.check_loadable(self.path, self.engine)
        self.evaluates(self.taught)
        again = resumption.Resume(str(cfg.resume).lower(), {}, {})  # without a checkpoint: it starts again
        self.out = run_folder.start_run(
            cfg, cfg.save_dir, overwrite=cfg.overwrite_dir, inputs=(self.path,), resume=again
        )
        peers.join()
        answers = self.evaluator.generated(self.path, self.engine.bf16)
        self.evaluator.compare(self.out, self.engine)
        with stages.stage("loading"):
            model = loading.load_frozen(self.path, self.engine)
        scores = self.evaluate(model, 0, answers)
        run_folder.finish_run(self.out, {**scores, "family": self.record})
        return scores

    def finish(self, trainer: dataloader.TofuTrainer, trained: dict[str, float]) -> dict[str, Any]:
        """Save the model and the scores, which say that the run is complete.

        Returns:
            The scores: of the training, of the method, and those of the saved weights' evaluation where there is one.
        """
        with signals.handled():  # the run is about to end: it ends whole
            return self._finish(trainer, trained)

    def _finish(self, trainer: dataloader.TofuTrainer, trained: dict[str, float]) -> dict[str, Any]:
        if self.epochs is not None and self.epochs.best is not None:
            self.epochs.best.place()
        elif self.cfg.get("save_model", True):
            self._save(trainer, self.out)
        trained_on.write(self.out, self.taught_here)
        done = {**trained, **self.method.result(), **(self.epochs.record() if self.epochs is not None else {})}
        run_folder.finish_run(self.out, {**done, "family": self.record})
        return done
