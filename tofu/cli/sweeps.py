"""A sweep: its jobs are listed before the first one starts, and a table at the end says what became of each."""

import contextlib
import dataclasses
import importlib.util
import itertools
import json
import logging
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

import utils
from tofu.cli.checks import check
from tofu.cli.schema import CONFIG_DIR, Evaluate, Finetune, Forget
from tofu.models import families
from tofu.runtime import ranks, resumption, run_folder
from utils import BadInput

log = logging.getLogger(__name__)

PLUGINS: dict[str, dict[str, str | None]] = {  # those of Hydra's that are described, and their modules
    "hydra/sweeper": {"basic": None, "optuna": "hydra_plugins.hydra_optuna_sweeper"},
    "hydra/launcher": {
        **{"basic": None, "processes": None, "joblib": "hydra_plugins.hydra_joblib_launcher"},
        **dict.fromkeys(("submitit_local", "submitit_slurm"), "hydra_plugins.hydra_submitit_launcher"),
    },
}
COMPLETE, CONTINUES, TO_DO, REFUSED = "complete", "continues", "to do", "refused"  # before the first job starts
DONE, FAILED, NOT_RUN = "done", "failed", "not run"  # afterwards; COMPLETE too
MULTIRUN = {"--multirun", "-m"}
POOL = "TOFU_SWEEP"  # set for a process that runs one job of a sweep: the job's number and the sweep's folder
PLACES = ("save_dir", "save_file")  # keys that vary because others do


@dataclass
class Planned:
    """A job as it is before the first one starts: its overrides, its folder, and its state with the reason."""

    overrides: list[str]
    place: str
    state: str = TO_DO
    why: str = ""


@dataclass
class Outcome:
    """What became of a job. `code` is the exit code that it asks for: 0, 2 for bad input, 1 for any other error."""

    number: int
    overrides: list[str]
    state: str
    why: str = ""
    seconds: float = 0.0
    code: int = 0
    value: Any = None  # what the job returns to a sweeper


def plain(override: str) -> str:
    """An override as it was typed: Hydra escapes braces."""
    return override.replace("\\{", "{").replace("\\}", "}")


def spread(argv: list[str], kind: type | None) -> list[str]:
    """A command line with a training's seed=[1,2,3] as a sweep over these seeds."""
    if kind not in (Finetune, Forget):
        return argv
    found = [re.sub(r"^(\+{0,2}seed)=\[([\d\s,]+)\]$", r"\1=\2", arg) for arg in argv]
    return found if found == argv or MULTIRUN & {*argv} else [found[0], "-m", *found[1:]]


@contextlib.contextmanager
def folder(argv: Sequence[str]) -> Iterator[str]:
    """A folder for what the processes of one sweep tell each other; it goes with the sweep.

    Each sweep has its own. Where `hydra.sweep.dir=FOLDER` names one that all hosts see, it lies in there.

    Raises:
        BadInput: nothing can be written there.
    """
    if POOL in os.environ:
        yield os.environ[POOL].partition(":")[2]
        return
    named = [one.partition("=")[2].strip("'\"") for one in argv if one.startswith("hydra.sweep.dir=")]
    place, new = None, None
    if named and MULTIRUN & {*argv}:
        whole = "$" not in named[-1]  # else it has a folder for each sweep, ${now:%H-%M}, which Hydra makes
        place = Path(named[-1] if whole else named[-1].partition("$")[0].rpartition("/")[0] or ".").absolute()
        new = place if not place.exists() else None
    try:
        if place is not None:
            place.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=place, prefix="outcomes-")
    except OSError as error:
        raise BadInput(f"hydra.sweep.dir={place} cannot be written ({error.strerror}): name another folder") from None
    try:
        with scratch as path:
            yield path
    finally:
        if new is not None:  # of a sweep that is refused nothing stays
            with contextlib.suppress(OSError):
                new.rmdir()


def _drawn(overrides: Sequence[str]) -> bool:
    """Whether a sweeper draws the jobs one by one."""
    return any(re.match(r"\+*hydra/sweeper=(?!basic$)", one) for one in overrides)


def missing(group: str, option: str) -> str | None:
    """The line that refuses a launcher or a sweeper of Hydra's that is not installed; None where nothing is missing."""
    module = PLUGINS.get(group, {}).get(option)
    if module is None or importlib.util.find_spec(module):
        return None
    return f"{group}={option} is not installed: pip install -e '.[sweep]'"


def check_plugins(overrides: Sequence[str]) -> None:
    """Refuse what a launcher or a sweeper of Hydra's cannot do.

    Raises:
        BadInput: several processes share each job, or a sweeper draws jobs by an objective that nobody has named.
    """
    other = next((one for one in overrides if re.match(r"\+*hydra/(sweeper|launcher)=(?!basic$)", one)), None)
    if other and ranks.world_size() > 1:
        raise BadInput(
            f"{other}: it starts processes for jobs by itself, and here are {ranks.world_size()} that share "
            "each job: start it with python, without torchrun"
        )
    if _drawn(overrides) and not any(one.startswith("objective=") for one in overrides):
        raise BadInput(
            f"{other}: it looks for the best value of a score: name the score, objective='Model Utility' say"
        )
    if other and (said := missing(other.partition("=")[0].lstrip("+"), other.partition("=")[2])):
        raise BadInput(said)


def settings(argv: Sequence[str]) -> list[str]:
    """Hydra's own settings: a process of the pool runs its one job here, and failed trials end no study."""
    ours = ["hydra/launcher=processes"] if POOL in os.environ else []
    return [*ours, *(["hydra.sweeper.max_failure_rate=1.0"] if "hydra/sweeper=optuna" in argv else [])]


def plan(name: str, kind: type | None, overrides: Sequence[str]) -> list[Planned]:
    """The jobs of a sweep, as they are before the first one starts.

    [] where Hydra or the job has something else to refuse, and where a sweeper draws the jobs one by one.

    Args:
        name: the config in config/.
        kind: its dataclass.

    Raises:
        BadInput: two jobs would write to one place.
    """
    if _drawn(overrides):
        return []
    found: dict[str, Planned] = {}
    configs: list[DictConfig] = []
    HydraConfig.instance().cfg = None  # an earlier command line's, in this process: it would answer for a job's number
    try:
        with hydra.initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            for number, job in enumerate(_jobs([one for one in overrides if not re.match(r"\W*hydra[./]", one)])):
                cfg = hydra.compose(name, [re.sub(r"\$\\?\{hydra\\?:job\.num\\?\}", str(number), one) for one in job])
                key = "save_dir" if "save_dir" in cfg else "save_file"
                place = str(cfg[key])
                if place in found:
                    raise BadInput(_shared(key, place, found[place].overrides, job))
                found[place] = Planned(job, place)
                configs.append(cfg)
    except (HydraException, OmegaConfBaseException, LookupError):
        return []
    logging.disable(logging.WARNING)  # each job says it again
    try:
        for planned, cfg in zip(found.values(), configs, strict=True):
            planned.state, planned.why = _state(cfg, kind, planned.overrides)
    finally:
        logging.disable(logging.NOTSET)
    return list(found.values())


def _jobs(overrides: Sequence[str]) -> list[list[str]]:
    """The overrides of every job of a sweep, in Hydra's order: the last key's values change fastest.

    Raises:
        HydraException: one that Hydra can't read.
    """
    values: dict[str, list[str]] = {}
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        swept = override.is_sweep_override()
        if swept and not override.is_discrete_sweep():
            raise HydraException(f"{override.input_line} has no end of values")
        key = override.get_key_element()
        found = override.sweep_string_iterator() if swept else [override.get_value_element_as_str()]
        values[key] = [f"{key}={value}" for value in found]
    return [list(job) for job in itertools.product(*values.values())]


def _shared(key: str, place: str, first: list[str], second: list[str]) -> str:
    """The line that refuses two jobs with one place, with a place of its own for each."""
    swept = [one.split("=", 1)[0] for one, other in zip(second, first, strict=True) if one != other]
    named = "".join(f"_${{{one}{'.name' if (CONFIG_DIR / one).is_dir() else ''}}}" for one in swept)
    typed = next((plain(one).split("=", 1)[1].strip("'\"") for one in second if one.startswith(f"{key}=")), place)
    said = f"two jobs of the sweep, {' '.join(first)} and {' '.join(second)}, share {key}={place}"
    return f"{said}: put the swept key into it, {key}='{typed}{named}'"


def _state(cfg: DictConfig, kind: type | None, overrides: list[str]) -> tuple[str, str]:
    """A job's state before the first one starts, and why it is refused."""
    if kind not in (Finetune, Forget, Evaluate):
        return TO_DO, ""
    try:
        cfg = check(cfg, kind)
        place = Path(cfg.save_dir)
        if kind is Evaluate:  # `overwrite` is true unless it is said: only who says so wants a complete one again
            again = cfg.overwrite and any(one.startswith("overwrite=") for one in overrides)
            if not again and run_folder.evaluated(cfg, place):
                return COMPLETE, ""
            _check_cached(cfg.model_path, kind)
            return TO_DO, ""
        there = "" if cfg.overwrite_dir or cfg.dry_run else run_folder.found(cfg, place)
        if there == "complete":
            return COMPLETE, ""
        goes_on = bool(there) and _goes_on(cfg, place)
        _check_cached(families.family(cfg.model_family).hf_key if kind is Finetune else cfg.model_path, kind)
    except BadInput as error:
        return REFUSED, str(error)
    return (CONTINUES if goes_on else TO_DO), ""


def _goes_on(cfg: DictConfig, place: Path) -> bool:
    """Whether a run that was cut off has a checkpoint to go on from; only its size and the processes are looked at.

    Raises:
        BadInput: it has one, and `resumption.Resume.look` would refuse it without a look at the model.
    """
    mode = str(cfg.resume).lower()
    steps = [path for path in (place / resumption.RESUME).glob("step-*") if (path / resumption.MANIFEST).is_file()]
    if mode == "false":
        why = f"a checkpoint in {resumption.RESUME}/ and resume=false" if steps else "an interrupted run"
        raise BadInput(f"save_dir={place} holds {why}: overwrite_dir=true starts again, resume=auto goes on")
    if not steps:
        return False
    made = utils.read_json(max(steps, key=resumption.step_of) / resumption.MADE_FROM, "resume")
    cut = cfg.batch_size * cfg.gradient_accumulation_steps * ranks.world_size()
    if made.get(resumption.CUT, cut) != cut:
        raise BadInput(
            f"save_dir={place} holds an interrupted run with other settings: {resumption.CUT}={made[resumption.CUT]} "
            f"(now {cut}): take the same, or overwrite_dir=true to start again"
        )
    name, stage = cfg.engine, ""
    if name == "auto":  # several GPUs share a model under DeepSpeed; whether there are any, torch alone knows
        name = "ddp" if ranks.world_size() == 1 else None
    if name == "deepspeed":
        stage = utils.read_json(cfg.ds_config, "ds_config").get("zero_optimization", {}).get("stage")
    if name is not None and "engine" in made:
        engine = {"kind": f"ZeRO-{stage}" if stage else name, "processes": ranks.world_size()}
        resumption.Resume(mode, {}, engine).check_engine(place, made["engine"])
    return True


def _check_cached(model: str, kind: type) -> None:
    """Raise BadInput for a hub's model that is not in the local cache where the hub may not be asked."""
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if HF_HUB_OFFLINE and not utils.is_local(model) and model not in utils.SHIPPED:
        utils.check_hub(model, "hf_key" if kind is Finetune else "model_path", "model", "config.json")


def tell(planned: Sequence[Planned]) -> None:
    """List the jobs before the first one starts.

    Raises:
        BadInput: jobs are refused; none has started.
    """
    if not planned:
        return
    names = _varying([one.overrides for one in planned])
    states = [one.state for one in planned]
    counts = ", ".join(f"{states.count(one)} {one}" for one in dict.fromkeys(states))
    rows = [[str(i), *_values(one.overrides, names), one.state] for i, one in enumerate(planned)]
    if len(planned) > 1:
        log.info("a sweep of %d jobs: %s\n%s", len(planned), counts, table(["job", *names, ""], rows))
    refused = [one for one in planned if one.state == REFUSED]
    if refused:
        more = f" ({len(refused) - 1} more jobs are refused)" if len(refused) > 1 else ""
        raise BadInput(f"{plain(' '.join(refused[0].overrides))}: {refused[0].why}{more}")


def _varying(jobs: Sequence[list[str]]) -> list[str]:
    """The keys whose values differ between jobs, in the order in which they were typed."""
    pairs = [dict(one.split("=", 1) for one in job) for job in jobs]
    keys = dict.fromkeys(key for pair in pairs for key in pair)
    return [key for key in keys if key not in PLACES and len({pair.get(key) for pair in pairs}) > 1]


def varying(planned: Sequence[Planned], number: int) -> str:
    """What sets a job of a sweep apart from the others, as it was typed; "" where no plan knows it."""
    if number >= len(planned):
        return ""
    names = _varying([one.overrides for one in planned])
    return " ".join(plain(one) for one in planned[number].overrides if one.split("=", 1)[0] in names)


def _values(overrides: list[str], names: Sequence[str]) -> list[str]:
    pairs = dict(one.split("=", 1) for one in overrides)
    return [plain(pairs.get(name, "")).strip("'\"") for name in names]


def table(head: list[str], rows: Sequence[list[str]]) -> str:
    """Rows below a head, in columns; the last column is as wide as it needs to be."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (head, *rows)]
    return "\n".join(f"  {line}".rstrip() for line in lines)


def write(outcome: Outcome, scratch: str) -> None:
    """Keep what became of a job in the sweep's folder, where the process that started the sweep finds it."""
    text = json.dumps(dataclasses.asdict(outcome))  # a value may be NaN, which no file of a run may hold
    utils.write_text(Path(scratch) / f"outcome-{outcome.number}.json", text)


def outcomes(scratch: str, planned: Sequence[Planned] = ()) -> list[Outcome]:
    """What became of the jobs, by number; those that left nothing have not run."""
    files = Path(scratch).glob("outcome-*.json")
    known = {one.number: one for one in (Outcome(**json.loads(file.read_text(encoding="utf-8"))) for file in files)}
    states = {i: COMPLETE if one.state == COMPLETE else NOT_RUN for i, one in enumerate(planned)}
    missing = {i: Outcome(i, planned[i].overrides, state) for i, state in states.items() if i not in known}
    return [one for _, one in sorted({**known, **missing}.items())]


def summary(ended: Sequence[Outcome]) -> str:
    """The table of outcomes: job, what varies, outcome, minutes."""
    names = _varying([one.overrides for one in ended])
    rows = []
    for one in ended:
        minutes = f"{one.seconds / 60:.1f}" if one.state in (DONE, FAILED) else ""
        said = f"{one.state}: {one.why}" if one.why else one.state
        rows.append([str(one.number), *_values(one.overrides, names), minutes, said])
    states = [one.state for one in ended]
    order = [one for one in (DONE, COMPLETE, FAILED, NOT_RUN) if one in states]
    counts = ", ".join(f"{states.count(one)} {one}" for one in order)
    return f"{len(ended)} jobs: {counts}\n{table(['job', *names, 'minutes', 'outcome'], rows)}"


def left(seconds: Sequence[float], todo: int, at_once: int = 1) -> str:
    """How many jobs are left, this one among them, and about how long they take, by the mean of those done so far."""
    if not todo:
        return ""
    said = "the last job" if todo == 1 else f"{todo} jobs left"
    if not seconds:
        return f" ({said})"
    minutes = sum(seconds) / len(seconds) * -(-todo // at_once) / 60
    return f" ({said}, about {minutes / 60:.1f} h)" if minutes > 90 else f" ({said}, about {minutes:.0f} min)"
