"""The retain model's evaluation for a forget split, `retain_result`: named, found by where it lies, or made."""

import contextlib
import fcntl
import hashlib
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_type_hints

from omegaconf import DictConfig, OmegaConf

import utils
from tofu.cli import repeat
from tofu.cli.schema import Finetune
from tofu.runtime import parent, provenance, ranks, signals
from tofu.runtime.provenance import CONFIG, FINISHED
from utils import BadInput, choice

log = logging.getLogger(__name__)

LOG = "eval_log_aggregated.json"
AUTO, MAKE = "auto", "make"
POLL = 0.2  # seconds between two looks
SAME = ("split", "ds_size", "generation.max_length")  # two evaluations of the same rows and lengths have these
NOT_RECIPE = (  # keys of a finetuning that the retain model's does not take from it
    *("save_dir", "split", "overwrite_dir", "dry_run", "progress", "report_to", "objective", "resume", "allow_pickle"),
)
NOT_OF_THE_ORACLE = (  # keys of an evaluation that the retain model's own does not take from it
    *("save_dir", "model_path", "retain_result", "oracle", "overwrite", "progress", "use_pretrained"),
    *("reinitialize_weights", "save_format", "batch_size"),
)
OF_A_LAUNCH = re.compile("RANK|WORLD_SIZE|LOCAL_|GROUP_|ROLE_|MASTER_|TORCHELASTIC_|TOFU_SWEEP")  # variables


def resolve(cfg: DictConfig, prefix: str = "") -> str | None:
    """The path of the retain result of this evaluation's split.

    Args:
        cfg: an evaluation's keys, its split with _perturbed.
        prefix: what stands before the keys on the command line.

    Raises:
        BadInput: none for this split is named, or none is found and none is to be made.
    """
    if cfg.oracle is not None:
        choice(f"{prefix}oracle", cfg.oracle, (MAKE,))
    named, split = cfg.retain_result, cfg.split.removesuffix("_perturbed")
    if cfg.oracle is not None and named != AUTO:
        raise BadInput(f"{prefix}oracle=make makes what is not found: it needs {prefix}retain_result=auto")
    if isinstance(named, DictConfig):
        named = {str(key).removesuffix("_perturbed"): path for key, path in named.items()}
        if not isinstance(named.get(split), str):
            raise BadInput(f"{prefix}retain_result has a path for {', '.join(named)}, and none for split={split}")
        return named[split]
    if named is not None and not isinstance(named, str):
        raise BadInput(
            f"{prefix}retain_result={named}: it must be a path, auto, or a path for each split, {{forget01: PATH}}"
        )
    return _find(cfg, split, prefix) if named == AUTO else named


def _find(cfg: DictConfig, split: str, prefix: str) -> str:
    retain = utils.complement(split)
    if retain is None:
        raise BadInput(f"{prefix}retain_result=auto: split={split} does not say what its retain split is: name the log")
    folders = _folders(cfg, retain)
    for folder in folders:
        fits = [file.parent for file in [*folder.glob(f"*/{FINISHED}"), *folder.glob(f"*/*/{FINISHED}")]]
        fits = [place for place in fits if _is_of(place, folder, cfg)]
        if fits:
            _tell_other_recipe(folder, cfg.model_path)
            return str(max(fits, key=lambda place: (place / FINISHED).stat().st_mtime) / LOG)
    if cfg.oracle == MAKE:
        if provenance.finetuning(cfg.model_path) is None:
            raise BadInput(
                f"{prefix}oracle=make: {cfg.model_path} does not say how it was finetuned (no {CONFIG} of a run): "
                f"finetune the retain model on {retain} yourself, and name its log, {prefix}retain_result=..."
            )
        rows, length = "all" if cfg.ds_size is None else cfg.ds_size, cfg.generation.max_length
        return str(folders[0] / f"eval_{split}_ds_size{rows}_max_length{length}" / LOG)  # SAME, a folder for each
    raise BadInput(
        f"{prefix}retain_result=auto: no evaluation of a model finetuned on {retain} with split={cfg.split} "
        f"ds_size={cfg.ds_size} is in {', '.join(map(str, folders))}: make it, or {prefix}oracle=make"
    )


def _folders(cfg: DictConfig, retain: str) -> list[Path]:
    """Where the retain model may lie, the likeliest place first: beside the finetuned model, or in runs/FAMILY."""
    found, start = [], provenance.finetuning(cfg.model_path)
    if start is not None:
        folder, made = start
        named = re.sub(rf"(^|_){re.escape(str(made.get('split')))}($|_)", rf"\g<1>{retain}\g<2>", folder.name)
        found += [folder.parent / named] if named != folder.name and named != retain else []
        found += [folder.parent / retain]
    elif utils.is_local(cfg.model_path):
        found += [Path(utils.find(cfg.model_path)).parent / retain]
    return list(dict.fromkeys([*found, Path("runs") / str(cfg.model_family) / retain]))


def _tell_other_recipe(folder: Path, model_path: str) -> None:
    """Say which settings of the retain model's finetuning are others than those of the model that is evaluated."""
    start = provenance.finetuning(model_path)
    if start is None or not (folder / CONFIG).is_file():
        return
    but = {*NOT_RECIPE, *provenance.NOT_SETTINGS}
    theirs, ours = (
        provenance.flat({key: one for key, one in OmegaConf.to_container(made).items() if key not in but})
        for made in (OmegaConf.load(folder / CONFIG), start[1])
    )
    keys = [key for key in ours if theirs.get(key, ours[key]) != ours[key]]
    if other := [f"{key}={theirs[key]} ({start[0]}: {ours[key]})" for key in keys]:
        log.warning("retain_result=auto: %s was finetuned otherwise: %s", folder, ", ".join(other))


def _is_of(place: Path, model: Path, cfg: DictConfig) -> bool:
    """Whether a folder holds the evaluation of the model above it, of the rows that `cfg` asks for."""
    if not all((place / name).is_file() for name in (CONFIG, LOG)):
        return False
    made = OmegaConf.load(place / CONFIG)
    if "eval_task" not in made or Path(str(made.get("model_path"))).name != model.name:
        return False
    return all(OmegaConf.select(made, key) == OmegaConf.select(cfg, key) for key in SAME)


def make(cfg: DictConfig) -> None:
    """Make the retain result that `resolve` has named, unless it is there: by this suite's scripts, once.

    Every process of the launch calls it; rank 0 makes it under the same launcher, the others wait.

    Raises:
        BadInput: a script has failed, or several hosts share the launch.
        signals.Interrupted: a signal has stopped it.
    """
    if cfg.oracle != MAKE:
        return
    place = Path(cfg.retain_result).parent

    def there() -> bool:
        return (place / FINISHED).is_file() and _is_of(place, place.parent, cfg)

    with signals.handled():
        while ranks.rank() > 0 and not there():
            _wait()
        if ranks.rank() == 0 and not there():
            with _alone(place.parent):
                if not there():
                    _run(cfg, place)


def _wait() -> None:
    """Wait a moment for what another process makes.

    Raises:
        signals.Interrupted: this process is asked to stop.
    """
    if asked := signals.requested():
        raise signals.Interrupted(None, "what is saved of the retain model stands", name=asked)
    time.sleep(POLL)


def _run(cfg: DictConfig, place: Path) -> None:
    """Finetune the retain model as the starting model was, unless that is done, and evaluate it."""
    (folder, made), split = provenance.finetuning(cfg.model_path), cfg.split.removesuffix("_perturbed")
    retain, bars = utils.complement(split), f"progress={repeat.quoted(cfg.progress)}"
    log.info("oracle=make: %s is finetuned on %s as %s was, then evaluated on %s", place.parent, retain, folder, split)
    taken = [key for key in get_type_hints(Finetune) if key in made and key not in NOT_RECIPE]
    recipe = _overrides({**{key: made[key] for key in taken}, "allow_pickle": cfg.allow_pickle})
    _script("finetune.py", *recipe, bars, f"split={retain}", f"save_dir={repeat.quoted(str(place.parent))}")
    rows = _overrides({key: cfg[key] for key in cfg if key not in NOT_OF_THE_ORACLE})
    _script("evaluate_util.py", *rows, bars, *repeat.said({"model_path": str(place.parent), "save_dir": str(place)}))


def _script(name: str, *overrides: str) -> None:
    """Run a script of the suite as a sweep of one job: what is complete stays, what was cut off goes on.

    A signal is passed on, and waited for; where we are killed it ends as by SIGTERM.

    Raises:
        BadInput: it has failed; it has said why.
        signals.Interrupted: it or this process was asked to stop.
    """
    start = [sys.executable]
    if (processes := ranks.world_size()) > 1:
        if int(os.environ.get("LOCAL_WORLD_SIZE", processes)) != processes:
            raise BadInput("oracle=make runs on one host: make the retain result first, on all of them")
        start += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
    environment = {key: value for key, value in os.environ.items() if not OF_A_LAUNCH.match(key)}
    environment[parent.PARENT] = str(os.getpid())
    words, asked = [*start, str(utils.REPO / name), "-m", *overrides], None
    child = subprocess.Popen(words, env=environment, start_new_session=True)  # Ctrl-C comes to us alone
    try:
        while child.poll() is None:
            if asked is None and (asked := signals.requested()):  # torchrun passes no SIGUSR1 on
                child.send_signal(signal.SIGTERM if processes > 1 else getattr(signal, asked))
            time.sleep(POLL)
    except BaseException:  # a second Ctrl-C
        child.kill()
        raise
    if asked or child.returncode == signals.CODE:
        raise signals.Interrupted(None, f"what {name} has saved of the retain model stands", name=asked)
    if child.returncode:
        raise BadInput(f"oracle=make: {name} {overrides[-1]} ended with exit code {child.returncode}; it has said why")


def _overrides(values: dict[str, Any]) -> list[str]:
    """Config values as Hydra's key=value."""
    plain = {key: OmegaConf.to_container(one) if OmegaConf.is_config(one) else one for key, one in values.items()}
    return repeat.said({key: one for key, one in provenance.flat(plain).items() if one != {}})


@contextmanager
def _alone(place: Path) -> Iterator[None]:
    """One process of this machine at a time for a retain model: jobs side by side make it once."""
    name = hashlib.sha256(str(place.resolve()).encode()).hexdigest()[:16]
    with (Path(tempfile.gettempdir()) / f"tofu-oracle-{os.getuid()}-{name}.lock").open("w") as lock:
        while True:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            _wait()
        yield
