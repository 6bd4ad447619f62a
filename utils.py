"""What every room needs: bad input and its wording, paths, the hub, and files that appear whole or not at all."""

import difflib
import json
import logging
import math
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

log = logging.getLogger(__name__)

REPO = Path(__file__).resolve().parent
SHIPPED = ("config", "data/mini", "data/tiny")  # what the scripts make or git holds, wherever they are started
PROBE_SECONDS = 5  # one question to the hub; the libraries' own retries take about 24 s each
ASIDE = ".writing."  # begins the name of what is not whole yet


class BadInput(ValueError):
    """What the user asked for cannot be done. The message is one line: what was wrong, what is allowed, what to do."""


def find(path: str | Path) -> str:
    """A local path made findable from any working directory.

    What the user names is looked for from the working directory; what the repository ships (see SHIPPED) is found from
    the repository. A path that does not exist comes back unchanged: it may be a hub id.
    """
    path = Path(path)
    if any(path.is_relative_to(shipped) for shipped in SHIPPED) and (REPO / path).exists():
        return str(REPO / path)
    return str(path.expanduser()) if path.expanduser().exists() else str(path)


def is_local(path: str | Path) -> bool:
    """Whether `path` names something on this machine (see `find`), not a hub id."""
    return Path(find(path)).exists()


def inside(name: str) -> bool:
    """Whether a relative path stays in the folder that it is relative to, by its own words."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and "\\" not in name and bool(path.parts)


READ = (".jsonl", ".json", ".csv", ".parquet")  # what a file with a split's rows ends with


def split_files(data_path: str) -> dict[str, Path] | None:
    """Split -> file, or folder of `Dataset.save_to_disk`, of a local folder; None where only `datasets` knows them.

    The head of a README.md names the splits (configurations) of a hub data set and their files. Every other file of
    rows is a split by its own name, drop.jsonl that of `drop`; a saved DatasetDict has its own.

    Raises:
        BadInput: two files of one name.
    """
    folder = Path(find(data_path))
    if not folder.is_dir():
        return None
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        return {"train": folder}
    named, plain = _card(folder / "README.md")
    if not plain:
        return None
    for file in named.values():
        if not inside(file):
            raise BadInput(f"{folder}/README.md names {file}, which is outside of the folder: copy the file into it")
    found = {name: folder / file for name, file in named.items() if (folder / file).is_file()}
    for path in sorted(folder.iterdir()):
        saved = (path / "state.json").is_file()
        if not saved and (path.suffix not in READ or path.name in (*named.values(), "dataset_dict.json")):
            continue
        name = path.name if saved else path.stem
        if name in found and name not in named:
            raise BadInput(f"data_path={data_path} has two files of a split {name}: {found[name].name} and {path.name}")
        found.setdefault(name, path)
    return found or None


def _card(card: Path) -> tuple[dict[str, str], bool]:
    """The split -> file of a data set's README.md, and whether each is one plain file (also if it names none)."""
    match = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8"), re.S) if card.is_file() else None
    try:
        configs = (yaml.safe_load(match[1]) or {}).get("configs", []) if match else []
        named = {str(one["config_name"]): one["data_files"] for one in configs}
    except (yaml.YAMLError, KeyError, TypeError, AttributeError):
        return {}, False
    return named, all(isinstance(file, str) and file.endswith(READ) for file in named.values())


def local_splits(data_path: str) -> list[str] | None:
    """The splits of a local folder, sorted; None where only `datasets` knows them (see `split_files`)."""
    files = split_files(data_path)
    return None if files is None else sorted(files)


def no_split(data_path: str, split: str, names: Iterable[str], key: str = "split") -> str:
    """The line that refuses a split: those that the data has."""
    return f"{key}={split} is not in {data_path}: it has {', '.join(sorted(names))}"


def complement(split: str) -> str | None:
    """The retain split that a forget split leaves, retain90 for forget10; None where the name does not say it."""
    match = re.fullmatch(r"forget(\d\d)(_perturbed)?", split)
    return f"retain{100 - int(match[1]):02d}" if match and match[1] != "00" else None


def check_place(name: str, key: str) -> None:
    """Raise BadInput unless `name` could be a hub id, owner/name. Asks nobody."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
        wrong = name.count("/") != 1
    except HFValidationError:
        wrong = True
    if wrong:
        raise BadInput(f"{key}={name}: no such folder, and no hub id (owner/name) either")


def check_hub(name: str, key: str, repo_type: str, filename: str | None) -> None:
    """Ask once, shortly, whether the hub (or its local cache) has `name`, and in it `filename`.

    Raises:
        BadInput: it has not, or cannot be reached.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache

    check_place(name, key)
    if isinstance(try_to_load_from_cache(name, filename, repo_type=repo_type), str) if filename else _cached(name):
        return
    try:
        found: Any = HfApi().repo_info(name, repo_type=repo_type, timeout=PROBE_SECONDS)
        files = found.siblings or []
    except Exception as error:  # whatever the transport raises, the answer to the user is the same line
        why = " ".join(str(error).split())[:160] or type(error).__name__
        raise BadInput(
            f"{key}={name}: no such folder, not in the local cache, and the hub does not give it ({why})"
        ) from None
    if filename and filename not in [file.rfilename for file in files]:
        raise BadInput(
            f"{key}={name}: the hub's repository has no {filename} in it, so it holds no whole {repo_type} (an adapter "
            f"is loaded from a folder: hf download {name} --local-dir FOLDER)"
        )


def hub_file(name: str, filename: str) -> str | None:
    """A small file of a hub model, from the local cache or, of a model that is not in it yet, from the hub.

    None if there is none, or the hub cannot be asked.
    """
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache

    if isinstance(file := try_to_load_from_cache(name, filename), str):
        return file
    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return None
    try:
        files = HfApi().model_info(name, timeout=PROBE_SECONDS).siblings or []
        return hf_hub_download(name, filename) if filename in [file.rfilename for file in files] else None
    except Exception:  # whatever the transport raises: that the model cannot be reached is said where it is loaded
        return None


def snapshot(name: str) -> str | None:
    """The folder of a hub data set's files in the hub's local cache; None if it is not there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return snapshot_download(name, repo_type="dataset", local_files_only=True)
    except LocalEntryNotFoundError:
        return None


def _cached(name: str) -> bool:
    """Whether a hub data set's files are in the hub's local cache, or its tables in that of `datasets`."""
    from datasets import config
    from datasets.naming import camelcase_to_snakecase

    owner, _, last = name.partition("/")
    tables = Path(config.HF_DATASETS_CACHE) / f"{owner}___{camelcase_to_snakecase(last)}"
    return tables.is_dir() or snapshot(name) is not None


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; what is written there becomes `path` only if the block ends well."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f"{ASIDE}{path.name}.")
    os.close(handle)
    try:
        yield Path(name)
        os.chmod(name, mode())  # mkstemp's 0600 would hide the result from a group that shares the folder
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def mode() -> int:
    """The mode of a new file that anybody may read whom the umask lets."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def write_text(path: str | Path, text: str) -> None:
    """Write `text` whole or not at all."""
    with atomic(path) as aside:
        aside.write_text(text, encoding="utf-8", errors="backslashreplace")  # names of files need not be UTF-8


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as JSON, whole or not at all.

    Raises:
        ValueError: a NaN or an infinity, which JSON cannot hold and a later reader would choke on.
    """
    write_text(path, json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def read_json(path: str | Path, key: str) -> Any:
    """The value in a JSON file that the user named.

    Raises:
        BadInput: no such file, or not whole JSON; `key` is the config key to name.
    """
    if not Path(find(path)).is_file():
        raise BadInput(f"{key}={path}: no such file")
    try:
        return json.loads(Path(find(path)).read_text(encoding="utf-8-sig"))  # some editors write a mark before it
    except ValueError as error:
        raise BadInput(f"{key}={path} is not whole JSON ({error}): make it again") from None


MASK = "***"  # stands where a credential stood
_SECRET = re.compile(
    r"(?P<scheme>[a-z][a-z0-9+.-]*://)[^/\s'\"@]+@"  # a URL's user and password
    r"|(?P<name>\b\w*(?:api_?key|secret|passw(?:or)?d|credentials?)[\"']?\s*[=:]\s*[\"']?)[^\s\"',;&}\]]+"
    r"|(?P<token>\b(?!(?:end|eos|bos|pad|unk)_)(?:\w+_)?token[\"']?\s*[=:]\s*[\"']?)(?=[^\s\"',;&]*\d)[\w./+=-]{8,}"
    r"|(?P<bearer>\bbearer )[\w./+=-]{8,}"
    r"|\b(?:hf_|gh[pos]_|glpat-|sk-(?:\w+-)?)[a-z0-9]{16,}|\bgithub_pat_\w{20,}"  # as services' tokens begin
    r"|\bAKIA[A-Z0-9]{16}\b",
    re.IGNORECASE,
)
_NAMED = re.compile(r"TOKEN|SECRET|PASSW|API_?KEY|CREDENTIAL", re.IGNORECASE)  # of environment variables


def masked(text: str) -> str:
    """A text that may be written down: what looks like a credential is ***.

    These are: a URL's user and password; the value of a key called ...api_key, ...token, ...secret or ...password; what
    begins as services' tokens do (hf_, ghp_, sk-, ...); and the values of environment variables of such names.
    """
    for name, value in os.environ.items():
        if len(value) >= 8 and _NAMED.search(name) and not os.path.exists(value):
            text = text.replace(value, MASK)
    return _SECRET.sub(lambda found: f"{''.join(part or '' for part in found.groups())}{MASK}{_at(found)}", text)


def _at(found: re.Match[str]) -> str:
    return "@" if found["scheme"] else ""


def one_line(error: object) -> str:
    """An error's text without its line breaks."""
    return " ".join(str(error).split())


def unknown(key: str, value: Any, allowed: Iterable[str]) -> str:
    """The line that refuses a value: the nearest of those allowed, and all of them."""
    allowed = list(allowed)
    near = difflib.get_close_matches(str(value), allowed, 1, 0.5)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return f"{key}={value} is unknown{hint}: it may be {', '.join(allowed)}"


def choice(key: str, value: Any, allowed: Iterable[str]) -> None:
    """Raise BadInput unless `value` is one of `allowed`; name the nearest."""
    allowed = list(allowed)
    if value not in allowed:
        raise BadInput(unknown(key, value, allowed))


def no_key(key: str, keys: list[str], of: str = "") -> str:
    """The line that refuses an unknown key: the nearest ones, and those on its level."""
    near = difflib.get_close_matches(key, keys, 2, 0.6)
    hint = f" (did you mean {' or '.join(near)}?)" if near else ""
    level = key
    while level and not any(name.startswith(level) for name in keys):
        level = level[: level.rstrip(".").rfind(".") + 1]
    beside = dict.fromkeys(level + name.removeprefix(level).split(".")[0] for name in keys if name.startswith(level))
    return f"{key} is no key{of}{hint}: there are {', '.join(beside)}"


def at_least(cfg: DictConfig, least: float, *keys: str, above: bool = False, prefix: str = "") -> None:
    """Raise BadInput unless the numbers at these keys, where they are not null, are at least (or above) `least`."""
    for key in keys:
        value = OmegaConf.select(cfg, key)
        if value is not None and not (math.isfinite(value) and (value > least if above else value >= least)):
            raise BadInput(f"{prefix}{key}={value}: it must be {'above' if above else 'at least'} {least}")
