"""Call 3: the entry scripts at 1B, under each engine of one card. benchmarks/gpu/call.sh 3 [--toy] [--only PART ...]

    engines   finetune.py under ddp, ZeRO-2 and ZeRO-3, the same rows: how far the steps' losses are apart
    methods   forget.py by five methods (toy: three), from what ddp has left
    batches   evaluate_util.py with batch_size=30 and 256 (toy: 1 and 3): how far the losses are apart, and how many
              generations differ

FSDP is refused on one process. The model has random weights.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from figures import Figures, begin, parser_of
from protocol import REPO, TORCHRUN, first_rows, run, the_model

from tofu.evaluation import logs

PARTS = ("engines", "methods", "batches")
METHODS = {False: ("npo", "KL", "rmu", "dpo", "grad_diff"), True: ("npo", "rmu", "dpo")}  # --toy -> forget_loss
BATCHES = {False: (30, 256), True: (1, 3)}  # --toy -> batch sizes of the evaluations
LOSSES = ("avg_gt_loss", logs.RIGHT, logs.WRONG)  # nats per token
LONGEST = {"1b": 150.0}  # size -> seconds of one process; none at toy size, where DeepSpeed compiles first
START = "ddp"  # the engine whose losses the others are compared with, and whose model the other parts take


class Call:
    """Entry scripts in one folder, each a process that leaves a figure."""

    def __init__(self, figures: Figures, folder: Path, size: str, rows: int) -> None:
        self.figures, self.folder, self.size = figures, folder, size
        the_model(size, folder / "model")
        self.data = f"data_path={first_rows(rows, folder / 'data')}"

    def run(self, part: str, name: str, script: str, *keys: str, launcher: tuple[str, ...] = ()) -> bool:
        """One process, whose run goes into the folder `name`. Returns whether it ended well."""
        told = (self.data, f"save_dir={name}", "progress=false", *keys)
        left = self.figures.left(LONGEST.get(self.size))
        row = run(name, self.size, self.folder, script, *told, launcher=launcher, timeout=left)
        values: dict[str, Any] = {"why": row.why} if row.why else {"seconds": row.seconds, "peak_gb": row.peak}
        if not row.why and (losses := self.losses(name)):
            values |= {"first_loss": losses[0], "last_loss": losses[-1]}
        self.figures.add(part, name, **values)
        return row.why is None

    def losses(self, name: str) -> list[float]:
        """Each step's, of a training; none of an evaluation."""
        state = self.folder / name / "trainer_state.json"
        history = json.loads(state.read_text())["log_history"] if state.is_file() else []
        return [line["loss"] for line in history if "loss" in line]

    def finetune(self) -> bool:
        """The run that the others are compared with, or start from."""
        keys = ("split=forget10", "num_epochs=2", "optim=adamw_torch_fused")
        return self.run("engines", START, "finetune.py", *keys, "engine=ddp")

    def engines(self) -> None:
        """DeepSpeed's, and how far each is from ddp."""
        keys = ("split=forget10", "num_epochs=2", "optim=adamw_torch_fused", "engine=deepspeed")
        zero2, zero3 = (f"ds_config={REPO}/config/{name}.json" for name in ("ds_config_zero2", "ds_config"))
        others = {"zero2": (zero2, TORCHRUN), "zero3": (zero3, TORCHRUN), "zero3_without_launcher": (zero3, ())}
        for name, (config, launcher) in others.items():
            if not self.run("engines", name, "finetune.py", *keys, config, launcher=launcher):
                continue
            both = list(zip(self.losses(START), self.losses(name), strict=False))
            apart = [abs(first - second) for first, second in both]
            if apart:
                self.figures.add("largest difference of a step's loss", f"{START}, {name}", nats=max(apart))
            shutil.rmtree(self.folder / name, ignore_errors=True)

    def methods(self, methods: tuple[str, ...]) -> None:
        """A few steps of each."""
        keys = ("split=forget10", f"model_path={START}", "num_epochs=2", "gradient_accumulation_steps=1")
        for method in methods:
            more = (f"forget_loss={method}", "save_model=false", "optim=adamw_torch_fused")
            self.run("methods", method, "forget.py", *keys, *more)

    def batches(self, rows: int, sizes: tuple[int, int]) -> None:
        """Evaluations of one model."""
        names = {size: f"batch_size_{size}" for size in sizes}
        keys = (f"model_path={START}", "split=forget10", f"ds_size={rows}")
        if all(
            [self.run("batches", name, "evaluate_util.py", *keys, f"batch_size={size}") for size, name in names.items()]
        ):
            found = [json.loads((self.folder / name / logs.AGGREGATED).read_text()) for name in names.values()]
            worst, differing, of = compared(*found)
            values = {"largest_loss_difference": worst, "differing_generations": differing, "of": of}
            self.figures.add("two batch sizes", " and ".join(map(str, sizes)), **values)


def compared(first: dict[str, Any], second: dict[str, Any]) -> tuple[float, int, int]:
    """Two aggregated logs of the same rows.

    Returns:
        The largest difference of a loss in nats per token, the number of rows whose generations differ, and of rows.
    """
    worst, differing, of = 0.0, 0, 0
    for task, log in first.items():
        for key in LOSSES:
            pairs = zip(numbers(log.get(key)), numbers(second[task].get(key)), strict=True)
            worst = max(worst, *(abs(a - b) for a, b in pairs), 0.0)
        for row, (_, text, _) in log["generated_text"].items():
            differing += text != second[task]["generated_text"][row][1]
            of += 1
    return worst, differing, of


def numbers(values: dict[str, Any] | None) -> Iterator[float]:
    """A metric's numbers, row after row."""
    for value in (values or {}).values():
        yield from value if isinstance(value, list) else [value]


def main() -> None:
    """Measure what is asked for."""
    args = parser_of(__doc__, PARTS).parse_args()
    size, rows, evaluated = ("toy", 24, 4) if args.toy else ("1b", 320, 150)
    figures = begin(3, f"model {size}, {rows} rows a split, {evaluated} of each evaluated", args)
    with tempfile.TemporaryDirectory() as folder:
        call = Call(figures, Path(folder), size, rows)
        if not call.finetune():
            return
        if "engines" in args.only:
            call.engines()
        if "methods" in args.only:
            call.methods(METHODS[args.toy])
        if "batches" in args.only:
            call.batches(evaluated, BATCHES[args.toy])


if __name__ == "__main__":
    main()
