"""What is in a model's folder or hub repository: found, identified, its tokenizer read."""

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils import cached_file, extract_commit_hash

import utils
from tofu.models import chat, families, pickles
from tofu.runtime import manifest, provenance
from utils import BadInput

log = logging.getLogger(__name__)


def resolve(path: str, key: str) -> str:
    """A model's folder or hub id, known to be reachable; of a folder with an adapter, its base too.

    Raises:
        BadInput: `path` is neither a folder with a model, nor in the hub's cache, nor on the hub; or a run's folder
            that is not whole (`manifest.check_model`). `key` is the config key to name.
    """
    key = "hf_key" if key == "model_family" else key  # whose value stands in config/model_config.yaml
    if utils.is_local(path):
        folder = Path(utils.find(path))
        manifest.check_model(folder, key)
        if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
            _check_files(folder)
            raise BadInput(f"{key}={path} holds no model: there is neither config.json nor adapter_config.json in it")
        _check_files(folder)
        if is_adapter(str(folder)):
            base = base_of(str(folder))
            resolve(base, f"{folder}/adapter_config.json: base_model_name_or_path")
            if is_adapter(base):
                raise BadInput(
                    f"{path} holds an adapter to another adapter, {base}: merge that one into its base first"
                )
        return str(folder)
    if path in utils.SHIPPED:
        raise BadInput(f"{path} is not built yet: python scripts/make_tiny.py builds it in a few minutes")
    utils.check_hub(path, key, "model", "config.json")
    return path


POINTER = b"version https://git-lfs"  # how the file begins that stands for one in Git LFS


def _check_files(folder: Path) -> None:
    """Raise BadInput where a folder's weights are GGUF's, were never fetched, or lie outside of it."""
    pickles.check_indexes(folder)
    weights = [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
    for file in weights + [folder / "tokenizer.json"]:
        if file.is_file() and file.stat().st_size < 1000 and file.read_bytes().startswith(POINTER):
            raise BadInput(f"{file} is a Git LFS pointer, no file: git lfs pull (or hf download) fetches what it names")
    if not weights and any(folder.glob("*.gguf")):
        raise BadInput(
            f"{folder} holds its weights in GGUF, which is not trained or scored here: load them with transformers "
            "(gguf_file=...), dequantised, and save the model"
        )


def identity(path: str, *, random_weights: bool = False) -> str:
    """A digest of everything in a model's folder that its predictions depend on; of a hub model, its commit.

    Args:
        path: as `resolve` gave it.
        random_weights: only the architecture and the tokenizer count.
    """
    kind = "random weights of " if random_weights else ""
    if not Path(path).is_dir():
        return f"{kind}{path}@{extract_commit_hash(cached_file(path, 'config.json'), None)}"
    patterns = ["config.json", "generation_config.json", "adapter_config.json", "tokenizer*", "special_tokens_map.json"]
    patterns += ["vocab*", "merges*"] + (
        [] if random_weights else ["*.safetensors", "pytorch_model*", "adapter_model*"]
    )
    files = sorted({file for pattern in patterns for file in Path(path).glob(pattern)})
    with ThreadPoolExecutor() as pool:  # hashing lets other threads run, and a large model has many files
        digests = pool.map(provenance.file_digest, files)
        listing = [f"{file.name} {digest}\n" for file, digest in zip(files, digests, strict=True)]
    if is_adapter(path):
        listing.append(identity(base_of(path), random_weights=random_weights))
    return f"{kind}sha256:{provenance.digest(''.join(listing))}"


def quick_identity(path: str) -> str:
    """A digest that tells a model from another one without reading its weights; of a hub model, its commit.

    Of a run's folder it is that of its finished.json; of another one that of its small files, and the weights' sizes.

    Args:
        path: as `resolve` gave it.
    """
    if not Path(path).is_dir():
        return identity(path)
    if (Path(path) / provenance.FINISHED).is_file():
        return f"sha256:{provenance.file_digest(Path(path) / provenance.FINISHED)}"
    small = [file for file in sorted(Path(path).glob("*config.json")) if file.is_file()]
    weights = sorted(file for kind in ("*.safetensors", "*.bin") for file in Path(path).glob(kind))
    listing = [f"{file.name} {provenance.file_digest(file)}\n" for file in small]
    listing += [f"{file.name} {file.stat().st_size}\n" for file in weights]
    if is_adapter(path):
        listing.append(quick_identity(base_of(path)))
    return f"sha256:{provenance.digest(''.join(listing))}"


def is_adapter(path: str) -> bool:
    """Whether a folder holds an adapter; a hub id never does."""
    return (Path(path) / "adapter_config.json").is_file()


def base_of(path: str) -> str:
    """The model that an adapter belongs to.

    Raises:
        BadInput: the adapter does not say.
    """
    file = Path(path) / "adapter_config.json"
    base = utils.read_json(file, "adapter").get("base_model_name_or_path")
    if not base:
        raise BadInput(f"{file} does not say which model the adapter belongs to: set its base_model_name_or_path")
    return utils.find(base)


@contextmanager
def told(what: str, path: str) -> Iterator[None]:
    """Make one line of whatever a library raises of files that it can't read: its types differ with their format."""
    try:
        yield
    except BadInput:  # it has said why
        raise
    except Exception as error:
        why = " ".join(str(error).split())
        if "trust_remote_code" in why:
            raise BadInput(
                f"{path} needs code of its own (auto_map in its config.json), which is never run here: take a model of "
                "an architecture that transformers has"
            ) from None
        if isinstance(error, UnpicklingError) or "weights_only" in why:
            todo = "" if what == "adapter" else ", or, if you trust who made them, set allow_pickle=true"
            if todo and provenance.repeated():
                todo += f" ({provenance.REPEATS}=... does not take it over)"
            raise BadInput(
                f"the {what} of {path} are in a file that holds more than tensors and could run any code when it is "
                f"read (a pickle): save them as safetensors{todo}"
            ) from None
        todo = "save or copy it again" if Path(path).is_dir() else f"hf download {path} fetches it whole"
        raise BadInput(f"the {what} of {path} cannot be loaded ({type(error).__name__}: {why[:300]}): {todo}") from None


def config_of(path: str) -> PretrainedConfig:
    """The config of a model, of an adapter that of its base.

    Raises:
        BadInput: it cannot be read.
    """
    whole = base_of(path) if is_adapter(path) else path
    with told("architecture", whole):
        return AutoConfig.from_pretrained(whole, trust_remote_code=False)


def load_asked(path: str, name: str, key: str) -> tuple[PreTrainedTokenizerBase, families.Family, dict[str, str]]:
    """The tokenizer of a model, how a family asks it, and the record that says so.

    Args:
        path: as `resolve` gave it.
        name: the family.
        key: the config key that names the model. `model_family` means the family's own pretrained model, which may be
            taught any tags.

    Raises:
        BadInput: see `load_tokenizer` and `chat.resolved`; also a family with other tags than the model was trained
            with.
    """
    family = families.family(name)
    tokenizer = load_tokenizer(path, family.end_token)
    check_vocabulary(path, tokenizer)
    family = chat.resolved(name, family, tokenizer)
    if family.unverified:
        log.warning("the tags of %s are unverified: python scripts/check_model.py %s compares them", name, name)
    record = families.record(name, family, tokenizer.eos_token)
    if key != "model_family":
        families.check_agrees(path, record, own=path in (family.hf_key, family.ft_model_path))
    return tokenizer, family, record


SMALLER = 0.9  # of the model's vocabulary: one is often padded, by some per cent


def check_vocabulary(path: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer whose tokens a model has no embeddings for; warn of one that looks like another model's.

    Raises:
        BadInput: more tokens than embeddings, or an end token beyond them.
    """
    rows = config_of(path).get_text_config().vocab_size
    end, size = tokenizer.eos_token_id, tokenizer.vocab_size
    if end >= rows:
        raise BadInput(
            f"{path}: its end token {tokenizer.eos_token} has the number {end}, and the model has {rows} embeddings: "
            "name another end_token in config/model_config.yaml, or resize the model's embeddings and save it again"
        )
    if size > rows:
        raise BadInput(
            f"{path}: its tokenizer has {size} tokens and the model {rows} embeddings (vocab_size in config.json): "
            "the tokenizer or the config.json is another model's"
        )
    if len(tokenizer) > rows:
        log.warning("%s: the tokenizer's last %d tokens have no embeddings", path, len(tokenizer) - rows)
    elif len(tokenizer) < SMALLER * rows:
        log.warning(
            "%s: the tokenizer has %d tokens and the model %d embeddings: is it this model's?",
            path,
            len(tokenizer),
            rows,
        )


TOKENIZER = ("tokenizer*", "vocab*", "spiece.model", "*.tiktoken")  # one of these is in every tokenizer's folder


def load_tokenizer(path: str, end_token: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer in `path`, its `eos_token` the one that ends an answer.

    Raises:
        BadInput: no tokenizer, no fast one (the answer's first token is found by character offsets), or no end token.
    """
    if is_adapter(path) and not (Path(path) / "tokenizer_config.json").is_file():
        path = base_of(path)
    if Path(path).is_dir() and not any(any(Path(path).glob(name)) for name in TOKENIZER):
        raise BadInput(f"{path} holds no tokenizer: copy tokenizer.json and tokenizer_config.json from its base model")
    with told("tokenizer", path):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    if not tokenizer.is_fast:
        raise BadInput(f"the tokenizer of {path} is a slow one: a fast tokenizer (tokenizer.json) is needed")
    if end_token is not None:
        if end_token not in tokenizer.get_vocab():
            raise BadInput(f"end_token={end_token} is not in the vocabulary of {path}")
        tokenizer.eos_token = end_token
    if tokenizer.eos_token_id is None:
        raise BadInput(f"the tokenizer of {path} has no end token: name one as end_token in model_config.yaml")
    return tokenizer
