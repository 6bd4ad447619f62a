"""`from=RUN` on a command line: the settings of RUN's recorded config as overrides, below the user's own.

What follows from other keys (`${...}` in the YAMLs) is left to follow, where it gives what the record holds: so
`from=RUN split=forget05` keeps and evaluates the rows that belong to forget05. What may run code of other people,
`allow_pickle` and a method's class from outside of this suite, no record can ask for: the command line alone does.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

import utils
from tofu.cli.schema import CONFIG_DIR
from tofu.runtime import provenance
from tofu.runtime.provenance import CONFIG, REPEATS, VERSIONS
from utils import BadInput

SCRIPTS = {"finetune": "finetune.py", "forget": "forget.py", "eval_everything": "evaluate_util.py"}  # config -> script
GONE = ("save_dir", "eval.save_dir", "forget_loss.by_split", "allow_pickle", "eval.allow_pickle")  # never taken over
METHOD, PLAIN = "forget_loss", "grad_ascent"  # the group of a method's keys; a file of it without keys of a class
OWN_PACKAGE = "tofu."  # begins the name of a class that is imported because a record says so
FOUND = ("retain_result", "eval.retain_result")  # the record has the path that `auto` came to


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
    found = _overrides(what, name, run, recorded, theirs)
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


def _overrides(what: str, name: str, run: Path, recorded: Mapping[str, Any], theirs: Mapping[str, str]) -> list[str]:
    """The overrides that make the config `name` what is recorded, but for what the user sets."""
    chosen, plain = _method(what, name, recorded, theirs)
    directory = _directory(run)
    wanted = {key: value for key, value in recorded.items() if key not in GONE and value != {}}
    if lost := [key for key in wanted if key not in plain and not key.startswith(f"{METHOD}.")]:
        raise BadInput(
            f"{what}: its config has {', '.join(lost)}, which {name}.yaml has no longer: repeat it with the version "
            "that made it (its versions.json names the commit)"
        )
    wanted |= _asked_for(run, recorded, theirs)
    mine = {key: _from_there(one, directory) for key, one in wanted.items()}
    if hidden := [key for key, value in mine.items() if utils.MASK in str(value) and not _set(key, theirs)]:
        raise BadInput(f"{what}: the record of {hidden[0]} leaves a credential out: give {hidden[0]}=...")
    found = {key: one for key, one in mine.items() if "${" not in str(plain.get(key)) and key != "retain_split"}
    composed = _compose(name, [*chosen, *_said(found, plain)])
    for key in mine.keys() - found.keys():
        if key == "retain_split":
            follows = utils.complement(str(OmegaConf.select(composed, "split")))
        else:
            follows = OmegaConf.select(composed, key)
        if _normal(follows) != _normal(mine[key]):
            found[key] = mine[key]
    return [*chosen, *_said({key: found[key] for key in mine if key in found and not _set(key, theirs)}, plain)]


def _said(values: Mapping[str, Any], plain: Mapping[str, Any]) -> list[str]:
    """Overrides; keys that the method's file has not, a class's own, join it."""
    return [one if _key(one) in plain else f"++{one}" for one in said(values)]


def _method(
    what: str, name: str, recorded: Mapping[str, Any], theirs: Mapping[str, str]
) -> tuple[list[str], dict[str, Any]]:
    """The overrides that choose the recorded method's file, if there is one that fits, and what is composed of them.

    Raises:
        BadInput: the method's class is none of this suite's, and neither its file nor the command line names it.
    """

    def composed(chosen: list[str]) -> tuple[list[str], dict[str, Any]]:
        return chosen, provenance.flat(OmegaConf.to_container(_compose(name, chosen), resolve=False))

    if f"{METHOD}.name" not in recorded:
        return composed([])
    kind, own = f"{METHOD}.class", recorded[f"{METHOD}.name"]
    there = isinstance(own, str) and (CONFIG_DIR / METHOD / f"{own}.yaml").is_file()
    chosen, plain = composed([f"{METHOD}={own if there else PLAIN}"])
    if plain.get(kind) == recorded.get(kind):
        parts = [part for part in ("forget", "retain") if plain[f"{METHOD}.{part}"] != recorded.get(f"{METHOD}.{part}")]
        numbers = [key for key in plain if key.startswith(tuple(f"{METHOD}.{part}_args." for part in parts))]
        lost = {key: plain[key] for key in numbers if key not in recorded}  # of the loss that the file has instead
        return composed([*chosen, *(f"~{one}" for one in said(lost))])
    if (named := recorded.get(kind)) and not str(named).startswith(OWN_PACKAGE) and not _set(kind, theirs):
        raise BadInput(
            f"{what}: its method's class, {named}, is none of this suite's, and a record alone has nothing imported: "
            f"if you trust it, name it, ++{kind}={named}"
        )
    return composed([f"{METHOD}={PLAIN}"])


def _asked_for(run: Path, recorded: Mapping[str, Any], theirs: Mapping[str, str]) -> dict[str, Any]:
    """What a run's command line asked for where the record has the path that it came to: auto, or one for each split.

    With `oracle=make` that was `auto`, and where the user names another path nothing is to be made.
    """
    found: dict[str, Any] = {}
    for key in FOUND:
        made = f"{key.removesuffix('retain_result')}oracle"
        if recorded.get(key) is not None and (asked := "auto" if recorded.get(made) else _typed(run, key)):
            found[key] = asked
        if _set(key, theirs) and theirs.get(key, "").strip("'\"") != "auto":
            found[made] = None
    return {key: one for key, one in found.items() if key in recorded}


def _typed(run: Path, key: str) -> Any:
    """What a run's command line, or that of the run that it repeats, gave for a key: auto or a mapping; else None."""
    seen: set[Path] = set()
    while run not in seen and (run / VERSIONS).is_file():
        seen.add(run)
        about = json.loads((run / VERSIONS).read_text(encoding="utf-8"))
        values = {_key(arg): arg for arg in about.get("command", ())[1:] if "=" in arg}
        if key in values:
            (typed,) = OverridesParser.create().parse_overrides([values[key]])
            value = None if typed.is_sweep_override() else typed.value()
            if isinstance(value, Mapping):
                return {str(split): path for split, path in value.items()}
            return value if value == "auto" else None
        if REPEATS not in values:
            return None
        run = Path(about.get("directory", ".")) / values[REPEATS].partition("=")[2].strip("'\"")
    return None


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
    if isinstance(value, dict):
        return {key: _from_there(one, directory) for key, one in value.items()}
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
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{quoted(one)}' for key, one in value.items())}}}"
    if isinstance(value, str):
        text = re.sub(r"(\\*)'", lambda found: f"{found[1] * 2}\\'", value)
        ending = re.search(r"\\+$", text)
        return f"'{text}{ending[0] if ending else ''}'"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
