"""The command line of every script: Hydra's, with --help out of the YAMLs' comments, and each error told once."""

import contextlib
import functools
import inspect
import io
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, get_type_hints

import hydra
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tofu.cli import repeat, sweeps
from tofu.cli.checks import CHECKS, told
from tofu.cli.jobs import BesideBars, Jobs, stop
from tofu.cli.schema import CONFIG_DIR, Forget
from tofu.runtime import parent, ranks
from utils import BadInput, choice, no_key, one_line, unknown

log = logging.getLogger(__name__)

NOISY = (
    "hydra",
    "alembic",
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

    Its grammar knows ASCII alone outside of quotes, and of that no < or >.
    """
    found = []
    for arg in argv:
        key, equal, value = arg.partition("=")
        if key.lstrip("+") == "forget_loss" and equal:
            arg = f"{key}={','.join(ALIASES.get(name, name) for name in value.split(','))}"
        elif equal and re.search(r"[^\x00-\x7f]|[<>]", value) and not re.search(r"""['"\[\]{}()]""", value):
            quoted = ",".join(f"'{one}'" for one in value.split(","))
            arg = f"{key}={quoted}"
        found.append(arg)
    return found


VALUED = {"--config-name", "-cn", "--config-path", "-cp", "--config-dir", "-cd", "--cfg", "-c", "--package", "-p"}


def _bare_paths(argv: list[str], key: str, keys: Iterable[str] = ()) -> list[str]:
    """A command line whose bare words, which are paths, stand in one list, KEY=[...], quoted for Hydra.

    A word with "=" is a path if there is one, as long as what stands before it is none of `keys`.

    Raises:
        BadInput: there are bare words, and the key too.
    """
    bare = [
        i
        for i, arg in enumerate(argv)
        if i
        and not arg.startswith("-")
        and ("=" not in arg or (os.path.exists(arg) and arg.partition("=")[0].lstrip("+~") not in keys))
        and argv[i - 1] not in VALUED
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
        after: called after a job (a sweep runs several in one process).
        paths: the key whose list bare words on the command line are.

    The line that stops a script goes to stderr from rank 0 alone; the exit code is 2 on every rank. `main` returns what
    the (last) job did.
    """

    def decorate(task: Callable[[DictConfig], Any]) -> Callable[[], None]:
        @functools.wraps(task)
        def main() -> Any:
            parent.end_with_parent()
            os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come to us, not to Hydra's printer
            kind, held, jobs = _kind(config_name), io.StringIO(), Jobs(task, after, sys.argv, _log)
            try:
                typed = sys.argv if paths is None else _bare_paths(sys.argv, paths, get_type_hints(kind))
            except BadInput as error:
                return stop(error)
            jobs.argv = argv = sweeps.spread(_renamed(typed), kind)
            name = _named(argv, config_name)
            with _one_line_errors(name, argv, held, jobs), sweeps.folder(argv) as jobs.scratch:
                if {"--help", "-h"} & set(argv[1:]):
                    return _help(name, task, argv[1:])
                _check_fits(name, config_name, argv)
                whole, jobs.given = repeat.expanded(argv, name, config_name)
                if sweeps.MULTIRUN & set(argv[1:]) and sweeps.POOL not in os.environ:
                    _log()
                    sweeps.check_plugins(_theirs(whole[1:]))
                    jobs.plan = sweeps.plan(name, _kind(name), _theirs(whole[1:]))
                    sweeps.tell(jobs.plan)
                sys.argv = [argv[0], *_ordered(whole[1:], [*_overrides(jobs.scratch), *sweeps.settings(argv)])]
                with jobs.told(), contextlib.redirect_stderr(held):  # every rank finds the same error
                    hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name=config_name)(jobs)()
            if ranks.rank() == 0:  # told by then
                sys.stderr.write(re.sub(r"Error executing job with overrides.*\n", "", held.getvalue()))
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
        if ranks.rank() > 0:
            sys.exit(130)
        stop(BadInput("interrupted"), 130)
    except (HydraException, OmegaConfBaseException) as error:
        if jobs.bug is not None:
            raise
        stop(BadInput(_explain(error, name, argv[1:])))
    except SystemExit as end:
        if end.code == 2 and held.getvalue():  # argparse has printed its usage and what it didn't understand
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
        if said := sweeps.missing(group, option):
            return said
        longer = option.replace("_gd", "_grad_diff").replace("_kl", "_KL")
        if longer in _options(group):
            return f"{group}={option} is unknown (did you mean {longer}?): it may be {', '.join(_options(group))}"
        return unknown(group or "--config-name", option, _options(group) or sweeps.PLUGINS.get(group, ()))
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
