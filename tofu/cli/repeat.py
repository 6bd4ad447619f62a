"""`from=RUN` on a command line: the settings of RUN's recorded config as overrides, below the user's own.

What follows from other keys (`${...}` in the YAMLs) is left to follow, where it gives what the record holds: so
`from=RUN split=forget05` keeps and evaluates the rows that belong to forget05.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

import utils
from tofu.cli.schema import CONFIG_DIR
from tofu.runtime import provenance
from tofu.runtime.provenance import CONFIG, REPEATS, VERSIONS
from utils import BadInput

SCRIPTS = {"finetune": "finetune.py", "forget": "forget.py", "eval_everything": "evaluate_util.py"}  # config -> script
GONE = ("save_dir", "eval.save_dir", "forget_loss.by_split")  # are never taken over


def expanded(argv: Sequence[str], name: str, default: str) -> tuple[list[str], frozenset[str]]:
    """A command line with the recorded settings of the run that it repeats in the place of from=RUN.

    Args:
        name: the config that the command line takes; `default`: the script's own.

    Returns:
        The command line, and the keys that the record gave.

    Raises:
        BadInput: no such run, one of another script, a save_dir that is missing or RUN's, or recorded keys that are no
            longer there.
    """
    named = [arg for arg in argv[1:] if arg.startswith(f"{REPEATS}=")]
    if not named:
        return list(argv), frozenset()
    path = named[-1].partition("=")[2].strip("'\"")
    what, run = f"{REPEATS}={path}", Path(utils.find(path))
    rest = [arg for arg in argv[1:] if not arg.startswith(f"{REPEATS}=")]
    theirs = {key: arg.partition("=")[2] for arg in rest if "=" in arg and (key := _key(arg))}
    recorded = _recorded(what, run, default)
    _check_theirs(what, run, theirs)
    found = _overrides(what, name, recorded, _directory(run), theirs)
    return [argv[0], *found, *rest], frozenset(map(_key, found))


def _key(arg: str) -> str:
    return arg.partition("=")[0].lstrip("+~")


def _recorded(what: str, run: Path, default: str) -> dict[str, Any]:
    """A run's recorded config, its keys joined by dots."""
    ours = SCRIPTS.get(default)
    if ours is None:
        raise BadInput(f"{what}: {' and '.join(SCRIPTS.values())} repeat runs, this script does not: leave it out")
    if not (run / CONFIG).is_file():
        raise BadInput(f"{what} holds no run of this suite (no {CONFIG}): name the folder of a run of {ours}")
    recorded = OmegaConf.to_container(OmegaConf.load(run / CONFIG), resolve=False)
    made = "forget" if "forget_loss" in recorded else "eval_everything" if "eval_task" in recorded else "finetune"
    if made != default:
        raise BadInput(f"{what} was made by {SCRIPTS[made]}, not by {ours}: python {SCRIPTS[made]} {what} save_dir=...")
    return provenance.flat(recorded)


def _directory(run: Path) -> Path | None:
    """The working directory in which a run was started; None where it did not record it."""
    file = run / VERSIONS
    found = json.loads(file.read_text(encoding="utf-8")).get("directory") if file.is_file() else None
    return Path(found) if found else None


def _check_theirs(what: str, run: Path, theirs: Mapping[str, str]) -> None:
    """Raise BadInput for overrides that do not go with a repetition."""
    place = theirs.get("save_dir", "").strip("'\"")
    if not place:
        raise BadInput(f"{what} needs a folder of its own: give save_dir=...")
    if "$" not in place and Path(place).expanduser().resolve() == run.resolve():
        raise BadInput(f"save_dir={place} is the run that {what} repeats: name another save_dir")
    for key in ("forget_loss", "experiment"):
        if key in theirs:
            raise BadInput(f"{key}={theirs[key]}: {what} repeats its method: leave {key} out, or leave {what} out")


def _overrides(
    what: str, name: str, recorded: Mapping[str, Any], directory: Path | None, theirs: Mapping[str, str]
) -> list[str]:
    """The overrides that make the config `name` what is recorded, but for what the user sets."""
    chosen = [f"forget_loss={recorded['forget_loss.name']}"] if "forget_loss.name" in recorded else []
    plain = provenance.flat(OmegaConf.to_container(_compose(name, chosen), resolve=False))
    wanted = {key: value for key, value in recorded.items() if key not in GONE and value != {}}
    if lost := [key for key in wanted if key not in plain]:
        raise BadInput(
            f"{what}: its config has {', '.join(lost)}, which {name}.yaml has no longer: repeat it with the version "
            "that made it (its versions.json names the commit)"
        )
    mine = {key: _from_there(one, directory) for key, one in wanted.items()}
    if hidden := [key for key, value in mine.items() if utils.MASK in str(value) and not _set(key, theirs)]:
        raise BadInput(f"{what}: the record of {hidden[0]} leaves a credential out: give {hidden[0]}=...")
    found = {key: one for key, one in mine.items() if "${" not in str(plain[key]) and key != "retain_split"}
    composed = _compose(name, [*chosen, *said(found)])
    for key in mine.keys() - found.keys():
        if key == "retain_split":
            follows = utils.complement(str(OmegaConf.select(composed, "split")))
        else:
            follows = OmegaConf.select(composed, key)
        if _normal(follows) != _normal(mine[key]):
            found[key] = mine[key]
    return [*chosen, *said({key: found[key] for key in mine if key in found and not _set(key, theirs)})]


def _set(key: str, theirs: Mapping[str, str]) -> bool:
    """Whether the user sets a key, or the group that it is in."""
    return any(key == one or key.startswith(f"{one}.") for one in theirs)


def _compose(name: str, overrides: list[str]) -> Any:
    HydraConfig.instance().cfg = None  # an earlier command line's, in this process
    with hydra.initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return hydra.compose(name, overrides)


def _normal(value: Any) -> Any:
    """A value as the check of a config leaves it: a list of equal entries is one, forget10 is forget10_perturbed."""
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value, resolve=True)
    if isinstance(value, list):
        found = [_normal(one) for one in value]
        return found[0] if found and all(one == found[0] for one in found) else found
    return f"{value}_perturbed" if isinstance(value, str) and re.fullmatch(r"forget\d\d", value) else value


def _from_there(value: Any, directory: Path | None) -> Any:
    """A recorded relative path, made findable where the working directory is another one than then."""
    if isinstance(value, list):
        return [_from_there(one, directory) for one in value]
    if not isinstance(value, str) or directory is None or "\n" in value or len(value) > 255 or not value.strip("./ "):
        return value
    return value if utils.is_local(value) or not (directory / value).exists() else str(directory / value)


def said(values: Mapping[str, Any]) -> list[str]:
    """Overrides in Hydra's grammar."""
    return [f"{key}={quoted(value)}" for key, value in values.items()]


def quoted(value: Any) -> str:
    """A value in Hydra's grammar; in quotes a backslash stands for itself, but before a quote and at the end."""
    if isinstance(value, list):
        return f"[{','.join(map(quoted, value))}]"
    if isinstance(value, str):
        text = re.sub(r"(\\*)'", lambda found: f"{found[1] * 2}\\'", value)
        ending = re.search(r"\\+$", text)
        return f"'{text}{ending[0] if ending else ''}'"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
