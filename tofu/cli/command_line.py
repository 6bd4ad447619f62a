"""The command line of every script: Hydra's, with --help out of the YAMLs' comments, and each error told once."""

import contextlib
import functools
import inspect
import io
import itertools
import logging
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from typing import Any, get_type_hints

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tofu.cli.checks import CHECKS, check, told
from tofu.cli.jobs import BesideBars, Jobs, plain, stop
from tofu.cli.schema import CONFIG_DIR, Finetune, Forget
from tofu.runtime import ranks
from utils import BadInput, choice, no_key, one_line, unknown

log = logging.getLogger(__name__)

NOISY = (
    "hydra",
    "httpx",
    "datasets",
    "filelock",
    "fsspec",
    "absl",
    "DeepSpeed",
    "torch.distributed",
    "urllib3",
    "fontTools",
    "matplotlib",
)
NO_ENTRIES = ("model_config", "run")  # YAMLs in config/ that no script takes by themselves
PRESETS = "experiment"  # the folder of config/ whose files set several keys at once
ALIASES = {  # names that people type elsewhere -> what that code runs
    **{"GradAscent": "grad_ascent", "GradDiff": "grad_diff", "NPO": "npo_grad_diff", "DPO": "dpo_grad_diff"},
    **{"SimNPO": "simnpo_grad_diff", "RMU": "rmu", "UNDIAL": "undial", "AltPO": "altpo", "WGA": "wga_grad_diff"},
    **{"SatImp": "satimp_grad_diff", "CEU": "ceu", "PDU": "pdu"},
}


MEANT = {  # keys that people type elsewhere -> ours
    **{"learning_rate": "lr", "num_train_epochs": "num_epochs", "epochs": "num_epochs", "output_dir": "save_dir"},
    **{"per_device_train_batch_size": "batch_size", "model_name_or_path": "model_path", "model": "model_family"},
    **{"forget_split": "split", "trainer": "forget_loss"},
}


def _renamed(argv: list[str]) -> list[str]:
    """A command line with the names of ALIASES in forget_loss=... turned into our own, and letters quoted for Hydra.

    Its grammar knows ASCII alone outside of quotes.
    """
    found = []
    for arg in argv:
        key, equal, value = arg.partition("=")
        if key.lstrip("+") == "forget_loss" and equal:
            arg = f"{key}={','.join(ALIASES.get(name, name) for name in value.split(','))}"
        elif equal and not value.isascii() and not re.search(r"""['"\[\]{}()]""", value):
            quoted = ",".join(f"'{one}'" for one in value.split(","))
            arg = f"{key}={quoted}"
        found.append(arg)
    return found


VALUED = {"--config-name", "-cn", "--config-path", "-cp", "--config-dir", "-cd", "--cfg", "-c", "--package", "-p"}


def _bare_paths(argv: list[str], key: str) -> list[str]:
    """A command line whose bare words, which are paths, stand in one list, KEY=[...], quoted for Hydra.

    Raises:
        BadInput: there are bare words, and the key too.
    """
    bare = [
        i
        for i, arg in enumerate(argv)
        if i and not arg.startswith("-") and "=" not in arg and argv[i - 1] not in VALUED
    ]
    if not bare:
        return argv
    if any(arg.startswith(f"{key}=") for arg in argv):
        raise BadInput(f"{argv[bare[0]]} and {key}=...: name all of them in one list, {key}=[A,B]")
    quoted = ",".join("'" + argv[i].replace("'", "\\'") + "'" for i in bare)
    return [*(arg for i, arg in enumerate(argv) if i not in bare), f"{key}=[{quoted}]"]


def entry(config_name: str, after: Callable[[], None] = lambda: None, paths: str | None = None) -> Callable:
    """Make `main(cfg)` a script's command line: Hydra's, writing nothing by itself and telling an error once.

    Args:
        config_name: the YAML in config/ that the script takes unless --config-name says otherwise.
        after: called after every job that ended well (a sweep runs several in one process).
        paths: the key whose list bare words on the command line are.

    The line that stops a script goes to stderr from rank 0 alone; the exit code is 2 on every rank. `main` returns what
    the (last) job did.
    """

    def decorate(task: Callable[[DictConfig], Any]) -> Callable[[], None]:
        @functools.wraps(task)
        def main() -> Any:
            os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come to us, not to Hydra's printer
            typed, jobs = sys.argv, Jobs(task, after)
            stderr, held = sys.stderr, io.StringIO()
            try:
                argv = _renamed(sys.argv if paths is None else _bare_paths(sys.argv, paths))
            except BadInput as error:
                return stop(error)

            @functools.wraps(task)
            def job(cfg: DictConfig) -> Any:
                sys.argv = typed  # as versions.json tells it
                with contextlib.redirect_stderr(stderr):
                    _log()
                    if argv != typed:
                        log.info("taken as: %s", " ".join(argv[1:]))
                    log.info("%s: checking the config, then loading the libraries", os.path.basename(argv[0]))
                    return jobs.run(cfg)

            with tempfile.TemporaryDirectory() as scratch:
                name = _named(argv, config_name)
                with _one_line_errors(name, argv, held, jobs):
                    if {"--help", "-h"} & set(argv[1:]):
                        return _help(name, task, argv[1:])
                    _check_fits(name, config_name, argv)
                    if {"--multirun", "-m"} & set(argv[1:]):
                        _check_sweep(name, _theirs(argv[1:]))
                    sys.argv = [argv[0], *_ordered(argv[1:], _overrides(scratch))]
                    with contextlib.redirect_stderr(held):  # every rank finds the same error: one of them tells it
                        hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name=config_name)(job)()
                if ranks.rank() == 0:
                    sys.stderr.write(held.getvalue())
                jobs.end()
                return jobs.result

        return main

    return decorate


@contextlib.contextmanager
def _one_line_errors(name: str, argv: list[str], held: io.StringIO, jobs: Jobs) -> Iterator[None]:
    """Turn what the command line is refused for into one line and exit code 2; sys.argv is as it was afterwards.

    Args:
        held: what Hydra has printed.
        jobs: a bug's error in a job passes.
    """
    typed = sys.argv
    try:
        yield
    except BadInput as error:
        stop(error)
    except KeyboardInterrupt:
        stop(BadInput("interrupted"), 130)
    except (HydraException, OmegaConfBaseException) as error:
        if jobs.bug is not None:
            raise
        stop(BadInput(_explain(error, name, argv[1:])))
    except SystemExit as end:
        if end.code and held.getvalue():  # argparse has printed its usage and what it didn't understand
            stop(BadInput(f"{held.getvalue().rpartition('error: ')[2]} (--help lists what there is)"))
        raise
    finally:
        sys.argv = typed


def _overrides(scratch: str) -> list[str]:
    """Hydra's own settings: no output folders, no log files, no change of directory."""
    return [
        *("hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=none", "hydra/hydra_logging=none"),
        *(f"hydra.sweep.dir='{scratch}'", "hydra.sweep.subdir=job${hydra:job.num}"),
    ]


def _ordered(args: list[str], ours: list[str]) -> list[str]:
    """Flags first, then our overrides, then the user's, wherever they stood: argparse wants them in one piece."""
    theirs = _theirs(args)
    return [*(arg for arg in args if arg not in theirs), *ours, *theirs]


def _theirs(args: list[str]) -> list[str]:
    """The overrides on a command line."""
    return [arg for arg in args if arg.startswith("~") or ("=" in arg and not arg.startswith("-"))]


def _check_fits(name: str, default: str, argv: list[str]) -> None:
    """Raise BadInput if the config `name`, or a preset, is another script's than the one that takes `default`."""
    script = os.path.basename(argv[0])
    presets = [arg for arg in _theirs(argv[1:]) if arg.lstrip("+").startswith(f"{PRESETS}=")]
    if presets and _kind(default) is not Forget:
        raise BadInput(f"{presets[0]}: the presets are settings of unlearning, forget.py takes them, {script} does not")
    if name in NO_ENTRIES:
        choice("--config-name", name, _options())
    if name == default or name not in _options():
        return
    kind, fits = _kind(default), [option for option in _options() if _kind(option) == _kind(default)]
    if _kind(name) not in (kind, None):
        raise BadInput(f"--config-name={name} is another script's config: {script} takes {', '.join(fits)}")


def _kind(name: str) -> type | None:
    """The dataclass whose fields a config's keys are; None where they are no script's."""
    keys = {key.split(".")[0] for key, _, _ in _explained(name)}
    return next((kind for kind in CHECKS if keys == set(get_type_hints(kind))), None)


def _check_sweep(name: str, overrides: list[str]) -> None:
    """Raise BadInput if two jobs of a sweep would write to one place: said before the first of them has trained.

    Silent where Hydra or the job has something else to refuse, and where only a job knows its place (${hydra:job.num}).
    """
    written: dict[str, list[str]] = {}
    composed: dict[str, DictConfig] = {}
    HydraConfig.instance().cfg = None  # an earlier command line's, in this process: it would answer for a job's number
    try:
        with hydra.initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            for job in _jobs(overrides):
                cfg = hydra.compose(name, job)
                key = "save_dir" if "save_dir" in cfg else "save_file"
                place = str(cfg[key])
                if place in written:
                    break
                written[place], composed[place] = job, cfg
            else:
                return _check_jobs(name, written, composed)
    except (HydraException, OmegaConfBaseException, LookupError):
        return
    swept = [one.split("=", 1)[0] for one, other in zip(job, written[place], strict=True) if one != other]
    named = "".join(f"_${{{one}{'.name' if (CONFIG_DIR / one).is_dir() else ''}}}" for one in swept)
    typed = next((plain(one).split("=", 1)[1].strip("'\"") for one in job if one.startswith(f"{key}=")), place)
    said = f"two jobs of the sweep, {' '.join(written[place])} and {' '.join(job)}, share {key}={place}"
    raise BadInput(f"{said}: put the swept key into it, {key}='{typed}{named}'")


def _jobs(overrides: list[str]) -> list[list[str]]:
    """The overrides of every job of a sweep, in Hydra's order: the last key's values change fastest.

    Raises:
        HydraException: one that Hydra can't read.
    """
    values: dict[str, list[str]] = {}
    for override in OverridesParser.create().parse_overrides(overrides):
        swept = override.is_sweep_override()
        if swept and not override.is_discrete_sweep():
            raise HydraException(f"{override.input_line} has no end of values")
        key = override.get_key_element()
        found = override.sweep_string_iterator() if swept else [override.get_value_element_as_str()]
        values[key] = [f"{key}={value}" for value in found]
    return [list(job) for job in itertools.product(*values.values())]


def _check_jobs(name: str, written: dict[str, list[str]], composed: dict[str, DictConfig]) -> None:
    """Raise BadInput if a job of a sweep of trainings will be refused: the others would train for hours before it."""
    kind = _kind(name)
    for place, job in written.items():
        if kind in (Finetune, Forget) and not any("${hydra:" in override for override in job):
            try:
                check(composed[place], kind)
            except BadInput as error:
                raise BadInput(f"{' '.join(job)}: {error}") from None


def _named(argv: list[str], default: str) -> str:
    """The config's name on a command line."""
    for i, arg in enumerate(argv):
        if arg.startswith(("--config-name=", "-cn=")):
            default = arg.split("=", 1)[1]
        elif arg in ("--config-name", "-cn") and i + 1 < len(argv):
            default = argv[i + 1]
    return default.removesuffix(".yaml")


def _log() -> None:
    """Rank 0 speaks; the others only of errors."""
    level, handler = logging.INFO if ranks.rank() == 0 else logging.ERROR, BesideBars()
    logging.basicConfig(
        level=level, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", handlers=[handler], force=True
    )
    for noisy in NOISY:
        logging.getLogger(noisy).setLevel(max(level, logging.WARNING))
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # of a kernel for CPUs that no run here asks for
    warnings.filterwarnings("ignore", r"`torch\.distributed\.", FutureWarning)  # DeepSpeed's calls, at every step
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # peft asks for it
    if ranks.rank() > 0:  # rank 0 passes on what libraries warn of
        warnings.simplefilter("ignore")
        for library in ("transformers", "accelerate", "peft"):
            logging.getLogger(library).setLevel(level)


def _explain(error: Exception, name: str, args: list[str]) -> str:
    """A composition error in one line, with what there is instead."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        option = option.removesuffix(".yaml")
        longer = option.replace("_gd", "_grad_diff").replace("_kl", "_KL")
        if longer in _options(group):
            return f"{group}={option} is unknown (did you mean {longer}?): it may be {', '.join(_options(group))}"
        return unknown(group or "--config-name", option, _options(group))
    if isinstance(error, OverrideParseException):
        key, _, value = error.override.partition("=")
        if re.search(r"[~=()]", value) and '"' not in value:
            return f"""{error.override}: Hydra reads ~ = ( ) only in quotes of its own: '{key}="{value}"'"""
        return f"{error.override} is no key=value that Hydra can read: {one_line(error.message.split('See http')[0])}"
    if match := re.search(r"Could not override '([^']+)'", str(error)):
        key = getattr(error.__cause__, "full_key", None) or match[1]
        if key in MEANT:
            return f"{key} is no key of {name}.yaml: it is called {MEANT[key]} here"
        chosen = {group: option for group, _, option in (arg.partition("=") for arg in args) if "," not in option}
        return no_key(key, [key for key, _, _ in _explained(name, chosen)], f" of {name}.yaml")
    return told(error)


def _options(group: str = "") -> list[str]:
    """The names of the YAMLs in config/, or in one of its folders."""
    names = sorted(path.stem for path in (CONFIG_DIR / group).glob("*.yaml"))
    return [name for name in names if name not in NO_ENTRIES]


def _about(preset: str) -> str:
    """What a preset is: the first comment of its file that says something."""
    lines = (CONFIG_DIR / PRESETS / f"{preset}.yaml").read_text(encoding="utf-8").splitlines()
    return next(line.removeprefix("# ") for line in lines if line.startswith("# ") and "@package" not in line)


def _explained(name: str, chosen: dict[str, str] | None = None, prefix: str = "") -> list[tuple[str, str, str]]:
    """(key, default, comment) of every key of a config and of what its defaults compose in, from the YAML text.

    Args:
        chosen: what the command line says; an option chosen from a group is explained instead of the default one.
    """
    chosen = chosen or {}
    found: dict[str, tuple[str, str]] = {}
    lines = (CONFIG_DIR / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    for default in OmegaConf.load(CONFIG_DIR / f"{name}.yaml").get("defaults", []):
        if isinstance(default, str) and default != "_self_":
            file, _, package = default.partition("@")
            found |= {key: rest for key, *rest in _explained(file, chosen, f"{package}." if package else "")}
        elif not isinstance(default, str):
            for group, option in default.items():
                option = chosen.get(group, option)
                choice(group, option, _options(group))
                found[group] = (option, f"a file of config/{group}: {', '.join(_options(group))}")
                found |= {key: rest for key, *rest in _explained(f"{group}/{option}", chosen, f"{group}.")}
    parents: list[str] = []
    for line in lines:
        match = re.match(r"( *)([\w.]+):(?: +([^#\s].*?))?(?: +# (.*))?$", line)
        if not match or match[2] == "defaults" or line.lstrip().startswith(("#", "-")):
            continue
        parents = [*parents[: len(match[1]) // 2], match[2]]
        key = ".".join(parents)
        if match[4]:
            found[key] = (match[3] or "", match[4])
    return [(prefix + key, *rest) for key, rest in found.items()]


def _help(name: str, task: Callable, args: list[str]) -> None:
    """Print the script's command lines and every key of its config with its default and its meaning."""
    choice("--config-name", name, _options())
    rows = _explained(name, dict(arg.split("=", 1) for arg in args if "=" in arg))
    width = min(34, max(len(key) + len(default) for key, default, _ in rows) + 1)
    text = [
        inspect.getmodule(task).__doc__.strip(),
        "",
        f"keys of config/{name}.yaml (key=value; -m sweeps over key=a,b):",
    ]
    text += [f"  {f'{key}={default}':<{width}}  {comment}" for key, default, comment in rows]
    if _kind(name) is Forget:
        text += ["", f"presets, several keys at once (+{PRESETS}=NAME; what else the command line says wins):"]
        text += [f"  {preset:<{width}}  {_about(preset)}" for preset in _options(PRESETS)]
    if ranks.rank() == 0:
        sys.stdout.write("\n".join(text) + "\n")
