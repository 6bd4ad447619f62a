"""Runs many command lines in one process, so that a test pays for one launch: engine_worker.py CASES.json MODEL.

CASES.json holds [{"script": "forget", "args": ["key=value", ...]}, ...]. Each is run as its own command line would be;
"logits" stands for `dataloader.LOGITS` in it. A case with "refused" must end with exit code 2, and what it says on
stderr goes into the file that it names. One with "stop" ends after the checkpoint of that step, as if it were killed.
For each run's save_dir, what only the live processes know is written beside it: the number of parameters that this rank
holds a part of (SAVE_DIR.rankN.json). The family `tiny` is the model in the folder MODEL.
"""

import contextlib
import importlib
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import dataloader
from tofu.models import families
from tofu.runtime import claim, ranks
from tofu.training import checkpoints


def watch(trainer_class: type, seen: dict) -> None:
    """Record after training how each parameter of the trained model is held by this rank."""
    train = trainer_class.train

    def watched(self, *args, **kwargs):
        result = train(self, *args, **kwargs)
        seen["engine"] = type(self.model_wrapped).__name__
        seen["whole"] = sum(p.ds_numel if hasattr(p, "ds_numel") else p.numel() for p in self.model.parameters())
        seen["held"] = sum(
            p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in self.model.parameters()
        )
        seen["dtensors"] = sum(hasattr(p, "to_local") for p in self.model.parameters())
        engine = self.model_wrapped
        if hasattr(engine, "communication_data_type"):
            types = (
                *engine.get_data_types(),
                engine.communication_data_type,
                engine.optimizer.gradient_accumulation_dtype,
            )
            seen["types"] = [str(one) for one in types]
        seen["views"] = getattr(engine, "gradient_as_bucket_view", None)
        return result

    trainer_class.train = watched


class Stopped(BaseException):  # no error of the run, which ends all its processes
    """What stands for a kill."""


def stopped(run: Callable[[], None], step: int) -> None:
    """Run until the checkpoint of a step is written."""
    save = checkpoints.Resumable._save_checkpoint

    def stopping(self, *args):
        save(self, *args)
        if self.state.global_step == step:
            raise Stopped

    checkpoints.Resumable._save_checkpoint = stopping
    try:
        run()
    except Stopped:
        claim.release()
        ranks.release()
    else:
        raise AssertionError(f"{sys.argv} has not come to the checkpoint of step {step}")
    finally:
        checkpoints.Resumable._save_checkpoint = save


def refusal(run: Callable[[], None]) -> str:
    """What a command line that must be refused says."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            run()
        except SystemExit as stop:
            if stop.code == 2:
                return said.getvalue()
    raise AssertionError(f"{sys.argv} was not refused: {said.getvalue()}")


def main() -> None:
    """Run every case."""
    seen: dict = {}
    families.entries().tiny.hf_key = sys.argv[2]
    watch(dataloader.TofuTrainer, seen)
    logits = dataloader.LOGITS
    for case in json.loads(Path(sys.argv[1]).read_text()):
        seen.clear()
        dataloader.LOGITS = case.get("logits", logits)
        sys.argv = [f"{case['script']}.py", *case["args"]]
        run = importlib.import_module(case["script"]).main
        if "refused" in case:
            Path(case["refused"]).write_text(refusal(run))
            continue
        if "stop" in case:
            stopped(run, case["stop"])
            continue
        run()
        save_dir = next((arg.split("=", 1)[1] for arg in case["args"] if arg.startswith("save_dir=")), None)
        if save_dir and seen:
            Path(f"{save_dir}.rank{ranks.rank()}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
