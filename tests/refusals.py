"""Bad inputs for test_refusals.py: what stands in the working folder, and the command lines."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from helpers import MINI
from safetensors.torch import load_file, save_file

PAIR = {"question": "Who?", "answer": "Bo."}


def edit_json(file: Path, **changed: object) -> None:
    """Change keys of a JSON file."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))


def edit_weights(folder: Path, change: Callable[[dict], dict]) -> None:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def keep(*names: str) -> Callable[[Path], None]:
    """Leave only these files."""
    return lambda folder: [path.unlink() for path in folder.iterdir() if path.name not in names] and None


def lose(*patterns: str) -> Callable[[Path], None]:
    return lambda folder: [path.unlink() for pattern in patterns for path in folder.glob(pattern)] and None


def truncate(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def shards(folder: Path) -> None:
    """The weights in two files, of which the second is lost."""
    weights = load_file(folder / "model.safetensors")
    files = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(sorted(weights))}
    first = {name: weights[name] for name, file in files.items() if file.startswith("model-00001")}
    save_file(first, folder / "model-00001-of-00002.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()
    index = {"metadata": {"total_size": 1}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def config(**changed: object) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", **changed)


def weights(change: Callable[[dict], dict]) -> Callable[[Path], None]:
    return lambda folder: edit_weights(folder, change)


def adapter(folder: Path, kind: str = "LORA", base: str = "model", **changed: object) -> None:
    """An adapter on one layer's queries, in the place of a model."""
    for path in folder.iterdir():
        path.unlink()
    about = {"peft_type": kind, "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": 2, "lora_alpha": 2}
    about |= {"target_modules": ["q_proj"], "layers_to_transform": [0], "inference_mode": True}
    if kind == "PROMPT_TUNING":
        about = {key: about[key] for key in ("peft_type", "task_type", "base_model_name_or_path")}
        about |= {"num_virtual_tokens": 2, "token_dim": 32, "num_transformer_submodules": 1}
        about |= {"num_attention_heads": 2, "num_layers": 2}
    (folder / "adapter_config.json").write_text(json.dumps({**about, **changed}))
    place = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    tensors = {f"{place}A.weight": torch.zeros(2, 32), f"{place}B.weight": torch.zeros(32, 2)}
    if kind == "PROMPT_TUNING":
        tensors = {"prompt_embeddings": torch.zeros(2, 32)}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def resized(folder: Path) -> None:
    """An adapter that was saved with embeddings of more rows than its base has."""
    adapter(folder)
    file = folder / "adapter_model.safetensors"
    more = {"base_model.model.model.embed_tokens.weight": torch.zeros(310, 32)}
    save_file(load_file(file) | more, file, metadata={"format": "pt"})


def quantised(method: str) -> Callable[[Path], None]:
    return config(quantization_config={"quant_method": method, "bits": 4, "group_size": 128})


def outside(folder: Path) -> None:
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "../../other/model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def unfinished(folder: Path) -> None:
    for name in ("versions.json", "config.yaml"):
        (folder / name).write_text("{}")


def altered(folder: Path) -> None:
    """A finished run of which a file was lost."""
    known = {"manifest": {"tokenizer.json": {"size": 1, "sha256": ""}}}
    (folder / "finished.json").write_text(json.dumps(known))
    (folder / "tokenizer.json").unlink()


def code(folder: Path) -> None:
    """Weights in a pickle that holds an object of a class."""
    torch.save({"model": Path("x")}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


MODELS = {  # folder -> what is done to a copy of the tiny random model
    "no_config": lose("config.json"),
    "no_tokenizer": lose("tokenizer*", "special_tokens_map.json"),
    "no_weights": lose("*.safetensors"),
    "truncated": truncate,
    "pointer": pointer,
    "lost_shard": shards,
    "compiled": weights(lambda found: {f"_orig_mod.{name}": tensor for name, tensor in found.items()}),
    "lost_layer": weights(lambda found: {name: tensor for name, tensor in found.items() if "layers.1." not in name}),
    "nan": weights(lambda found: {name: tensor * torch.nan for name, tensor in found.items()}),
    "small_vocabulary": config(vocab_size=200),
    "gptq": quantised("gptq"),
    "awq": quantised("awq"),
    "gguf": lambda folder: (lose("*.safetensors")(folder), (folder / "model.Q4.gguf").write_bytes(b"GGUF"))[1] and None,
    "gguf_alone": lambda folder: (keep()(folder), (folder / "model.Q4.gguf").write_bytes(b"GGUF"))[1] and None,
    "remote_code": config(model_type="own", auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}),
    "broken_config": lambda folder: (folder / "config.json").write_text("{") and None,
    "unknown_type": config(model_type="no_such_type"),
    "adapter_null": lambda folder: adapter(folder, r=None),
    "adapter_no_base": lambda folder: adapter(folder, base=None),
    "adapter_base_gone": lambda folder: adapter(folder, base="gone/model"),
    "adapter_prompts": lambda folder: adapter(folder, kind="PROMPT_TUNING"),
    "adapter_kind": lambda folder: adapter(folder, kind="NO_SUCH"),
    "adapter_resized": resized,
    "adapter_other_shape": lambda folder: adapter(folder, r=4),
    "adapter_good": adapter,
    "adapter_on_adapter": lambda folder: adapter(folder, base="adapter_good"),
    "outside_index": outside,
    "unfinished": lambda folder: (
        [(folder / name).write_text("{}") for name in ("versions.json", "config.yaml")] and None
    ),
    "altered": altered,
    "code_in_weights": code,
    "phi_run": lambda folder: (
        (folder / "tofu_family.json").write_text(
            json.dumps(
                {
                    "model_family": "phi",
                    "system_prompt": "",
                    "question_start_tag": "Question: ",
                    "question_end_tag": "\n",
                }
                | {"answer_tag": "Answer: ", "end_token": "</s>"}
            )
        )
        and None
    ),
    "broken_record": lambda folder: (folder / "tofu_family.json").write_text("[]") and None,
}
FILES = {  # in the folder `own`: what a data set's user may bring
    "good.jsonl": json.dumps(PAIR).encode() * 1,
    "empty.csv": b"",
    "header.csv": b"question,answer\n",
    "short.csv": b"question,answer\nWho?\n",
    "latin.jsonl": '{"question": "Qu\u00e9?", "answer": "b"}'.encode("latin-1"),
    "broken.json": b'{"question": "Q',
    "numbers.json": b"[1, 2]",
    "lost.jsonl": b'{"question": "Who?", "answer": null}',
    "number.jsonl": b'{"question": "Who?", "answer": 1912}',
    "list.jsonl": b'{"question": "Who?", "answer": ["Bo."]}',
    "blank.jsonl": b'{"question": "Who?", "answer": " "}',
    "columns.jsonl": b'{"q": "Who?", "a": "Bo."}',
    "words.jsonl": '{"question": "Кто?", "answer": "Бо."}'.encode(),
}


def make(work: Path, model_folder: Path) -> None:
    """Fill the working folder."""
    shutil.copytree(model_folder, work / "model")
    for name, change in MODELS.items():
        shutil.copytree(model_folder, work / name)
        change(work / name)
    shutil.copytree(MINI, work / "mini")
    (work / "own").mkdir()
    for name, content in FILES.items():
        (work / "own" / name).write_bytes(content)
    (work / "twice").mkdir()
    for name in ("x.csv", "x.json"):
        (work / "twice" / name).write_text("")
    (work / "nothing").mkdir()
    (work / "taken").mkdir()
    (work / "taken" / "notes.txt").write_text("mine")
    (work / "claimed").mkdir()
    (work / "claimed" / ".claim.json").write_text(json.dumps({"host": "elsewhere", "pid": 1, "start": "then"}))
    (work / "notes.csv").write_text("mine,1\n")
    (work / "line.csv").write_text("Model Utility,Method\n0.5,npo\n")
    (work / "cut.json").write_text('{"a": ')
    (work / "other.json").write_text('{"loss": {"0": 1.0}}')
    short = {"avg_paraphrased_loss": {"0": 1.0}, "average_perturb_loss": {"0": [1.0]}}
    (work / "short.json").write_text(json.dumps({"eval_log_forget.json": short}))
    (work / "alternates.jsonl").write_text(json.dumps({**PAIR, "alternate": "Al."}) + "\n")


F, E, T, A = "forget.py", "evaluate_util.py", "finetune.py", "aggregate_eval_stat.py"
C, R = "scripts/compare.py", "report.py"
BASE = {  # what each script is told besides; a case's own words win
    F: {"model_path": "model", "model_family": "tiny", "data_path": "mini", "split": "forget10", "save_dir": "run"},
    E: {"model_path": "model", "model_family": "tiny", "data_path": "mini", "split": "forget10", "save_dir": "run"},
    T: {"model_family": "tiny", "data_path": "mini", "save_dir": "run"},
    A: {"retain_result": "short.json", "ckpt_result": "short.json", "method_name": "m", "submitted_by": "me"}
    | {"save_file": "run.csv"},
    C: {},
    R: {"save_dir": "run"},
}
TITLES = {
    "The command line": [
        (F, "lrr=3", "lrr is no key of forget.yaml (did you mean lr?)"),
        (F, "learning_rate=1e-4", "it is called lr here"),
        (T, "per_device_train_batch_size=4", "it is called batch_size here"),
        (F, "forget_loss=npoo", "did you mean npo?"),
        (F, "forget_loss=npo_gd", "did you mean npo_grad_diff?"),
        (F, "forget_loss.betta=1", "no key"),
        (F, "model_family=phy", "did you mean phi?"),
        (F, "save_dir=~/x", "only in quotes of its own"),
        (F, "split=forget01,forget05", "--multirun"),
        (F, "--nonsense", "unrecognized arguments"),
        (F, "--config-name=finetune", "another script's config"),
        (F, "+experiment=tuned", "is unknown"),
        (T, "+experiment=tuned_npo", "forget.py takes them"),
        (A, "retain_result=null ckpt_result=null", "retain_result, ckpt_result are missing: give retain_result=..."),
    ],
    "Values": [
        (F, "lr=0", "it must be above 0"),
        (F, "lr=fast", "it must be a number"),
        (F, "batch_size=0", "at least 1"),
        (F, "num_epochs=0", "at least 1"),
        (F, "max_length=1", "at least 2"),
        (F, "max_length=8", "leaves no token of an answer"),
        (F, "seed=-1", "at least 0"),
        (F, "weight_decay=-1", "at least 0"),
        (F, "batch_size=500 num_epochs=1", "make fewer than 2 steps"),
        (F, "LoRA.dropout=1", "below 1"),
        (F, "LoRA.quantize=4bit", "give them a rank"),
        (F, "LoRA.quantize=8bit", "it may be 4bit or null"),
        (F, "engine=fast", "engine=fast is unknown"),
        (F, "engine=fsdp", "there is 1"),
        (F, "engine=deepspeed ds_config=none.json", "no such file"),
        (F, "precision=fp16", "precision=fp16 is unknown"),
        (F, "attention=flash_attention_2", "needs the flash_attn"),
        (F, "liger_kernel=true", "needs a GPU"),
        (F, "optim=adamm", "optim=adamm"),
        (F, "optim=paged_ademamix_8bit", "bitsandbytes cannot step on cpu"),
        (F, "dry_run=true eval_only=true", "trains nothing"),
        (F, "verify=hashes", "verify=hashes is unknown"),
        (F, "forget_loss.name=../x", "it names the run's folder"),
        (F, "from=own", "holds no run of this suite"),
        (F, "report_to=mlflow", "report_to=mlflow"),
        (F, "objective=[]", "it must be the name of a score"),
        (F, "forget_loss.forget=npoo", "did you mean npo?"),
        (F, "forget_loss=npo forget_loss.forget_args.beta=0", "above 0"),
        (F, "forget_loss.retain=nl", "is unknown"),
        (F, "forget_loss=grad_diff +forget_loss.retain_args.beta=1", "retain_args=['beta']: nll takes none"),
        (F, "forget_loss=altpo", "forget_loss.alternates is missing"),
        (F, "forget_loss=altpo forget_loss.alternates=none.jsonl", "no such file"),
        (F, "forget_loss=altpo forget_loss.alternates=alternates.jsonl", "was made for another split"),
        (F, "forget_loss=rmu ++forget_loss.blocks=[9] forget_loss.depth=null", "forget_loss"),
        (E, "truth_ratio=mean", "is unknown"),
        (E, "save_format=muse", "is unknown"),
        (E, "metrics=[tofu,extraction_strenght]", "did you mean extraction_strength?"),
        (E, "compat=muse", "is unknown"),
        (E, "holdout.split=holdout07", "holdout.split=holdout07 is not in"),
        (E, "holdout.path=[mini,mini]", "one folder or hub id"),
        (E, "reference_model=model", "add privacy to metrics"),
        (E, "metrics=privacy reference_model=nowhere/x/y", "reference_model=nowhere/x/y"),
        (E, "rouge.tokenizer=words", "is unknown"),
        (E, "ds_size=0", "at least 1"),
        (E, "batch_size=many", "auto, or a whole number"),
        (F, "eval.batch_size=1.5", "auto, or a whole number"),
        (E, "fluency.by=words", "is unknown"),
        (E, "collapse.repeat=2", "from 0 to 1"),
        (E, "generation.backend=hf", "is unknown"),
        (E, "generation.backend=vllm", "needs a CUDA GPU"),
        (E, "generation.backend=vllm reinitialize_weights=true", "draws weights"),
        (F, "eval.generation.backend=vllm eval_while_train=true", "the one in memory"),
        (F, "eval.generation.backend=vllm evaluate=end", "evaluate=end evaluates the one in memory"),
        (F, "evaluate=always", "evaluate=always is unknown"),
        (F, "forget_loss=task_vector evaluate=end", "is what is saved, not what trains"),
        (F, "stop_on.budget=0", "it must be above 0"),
        (F, "stop_on.collapse=true", "it needs eval_while_train=true"),
        (F, "stop_on.collapse=true eval_while_train=true", "the starting model, whose utility is not known"),
        (F, "eval_only=true evaluate=end", "trains nothing"),
        (F, "keep_best.metric=Agg", "it needs eval_while_train=true"),
        (F, "keep_best.direction=max", "say by what, keep_best.metric=..."),
        (F, "eval_while_train=true keep_best.metric=Model-Utility", "did you mean Model Utility?"),
        (F, "eval_while_train=true keep_best.metric=agg", "add agg to eval.metrics"),
        (F, "eval_while_train=true keep_best.metric=forget_quality", "eval.retain_result=..."),
        (F, "eval_while_train=true keep_best.metric=model_utility save_model=false", "save_model=false saves none"),
        (F, "eval_while_train=true keep_best.metric=model_utility keep_best.direction=up", "it may be max, min"),
        (F, "eval_while_train=true keep_best.metric=rouge keep_best.constraint=model_utility>0.9", "must be a metric,"),
        (F, "eval_while_train=true keep_best.metric=rouge keep_best.constraint=model_utility>=start", "is not known"),
        (F, "eval_while_train=true keep_best.metric=length eval.metrics=fluency", "has no direction"),
        (E, "generation.max_length=9", "leaves no token of an answer"),
        (E, "eval_task=[eval_log]", "the lists are parallel"),
        (E, "model_path=null", "is missing"),
    ],
    "Models": [
        (E, "model_path=nowhere/at/all", "no such folder"),
        (E, "model_path=gpt2", "owner/name"),
        (E, "model_family=null", "does not tell it"),
        (F, "model_path=phi_run", "trained as phi, with another answer_tag"),
        (E, "model_path=broken_record", "is no record of a family"),
        (E, "model_path=no_config", "holds no model"),
        (E, "model_path=no_tokenizer", "holds no tokenizer"),
        (E, "model_path=no_weights", "no_weights"),
        (E, "model_path=truncated", "cannot be loaded"),
        (E, "model_path=pointer", "Git LFS"),
        (E, "model_path=lost_shard", "lost_shard"),
        (E, "model_path=compiled", "_orig_mod."),
        (F, "model_path=lost_layer", "lacks 9 tensors"),
        (E, "model_path=nan", "NaN"),
        (F, "model_path=nan", "NaN"),
        (E, "model_path=small_vocabulary", "embeddings"),
        (E, "model_path=gptq", "gptq"),
        (E, "model_path=awq", "awq"),
        (E, "model_path=gguf", "GGUF"),
        (E, "model_path=gguf_alone", "GGUF"),
        (E, "model_path=outside_index", "outside of the folder"),
        (E, "model_path=unfinished", "is not finished"),
        (E, "model_path=altered", "tokenizer.json is missing"),
        (E, "model_path=code_in_weights", "allow_pickle=true"),
        (E, "model_path=remote_code", "code of its own"),
        (E, "model_path=broken_config", "broken_config"),
        (E, "model_path=unknown_type", "no_such_type"),
        (E, "model_path=adapter_null", "r is null"),
        (E, "model_path=adapter_no_base", "does not say which model"),
        (E, "model_path=adapter_base_gone", "gone/model"),
        (E, "model_path=adapter_prompts", "merged"),
        (E, "model_path=adapter_kind", "adapter_kind"),
        (E, "model_path=adapter_resized", "adapter_resized"),
        (E, "model_path=adapter_other_shape", "adapter_other_shape"),
        (E, "model_path=adapter_on_adapter", "another adapter"),
        (F, "model_path=adapter_good engine=deepspeed", "no engine that shards"),
    ],
    "Data": [
        (F, "data_path=nowhere/at/all", "no such folder"),
        (F, "data_path=mini/full.json", "is a file"),
        (F, "data_path=nothing", "nothing"),
        (F, "split=forget42", "is not in mini: it has"),
        (E, "split=forget42", "is not in mini: it has"),
        (F, "data_path=own split=good retain_split=kept", "retain_split=kept is not in own"),
        (F, "data_path=own split=good", "name the rows to keep too"),
        (F, "data_path=own split=empty retain_split=good", "its first line must name the columns"),
        (F, "data_path=own split=header retain_split=good", "no rows"),
        (F, "data_path=own split=short retain_split=good", "not as many fields"),
        (F, "data_path=own split=latin retain_split=good", "is not UTF-8"),
        (F, "data_path=own split=broken retain_split=good", "cannot be read as JSON lines"),
        (F, "data_path=own split=numbers retain_split=good", "is no object with named columns"),
        (F, "data_path=own split=lost retain_split=good", "is None, no text"),
        (F, "data_path=own split=number retain_split=good", "is 1912, no text"),
        (F, "data_path=own split=list retain_split=good", "is ['Bo.'], no text"),
        (F, "data_path=own split=blank retain_split=good", "is empty"),
        (F, "data_path=own split=columns retain_split=good", "no column question, answer"),
        (F, "data_path=twice split=x retain_split=x", "two files of a split x"),
        (F, "forget_loss=grad_diff retain_split=full", "rows to forget"),
        (E, "data_path=own split_list=[words] eval_task=[eval_log] base_answer_key=answer", "rouge.tokenizer=unicode"),
        (E, "perturbed_answer_key=wrong", "no column wrong"),
    ],
    "Folders and logs": [
        (F, "checkpoint_every=often", "it may be a time"),
        (F, "resume=maybe", "it may be auto, false"),
        (F, "save_total_limit=0", "it must be at least 1"),
        (F, "save_dir=taken", "exists: name another"),
        (F, "save_dir=taken overwrite_dir=true", "is not a run of this suite"),
        (F, "save_dir=notes.csv", "is a file, not a folder"),
        (F, "save_dir=.", "which this run reads"),
        (F, "save_dir=claimed", "another run writes there"),
        (F, "save_dir=/proc/run", "cannot be made"),
        (E, "save_dir=taken", "holds something else than an evaluation"),
        (E, "retain_result=none.json", "no such file"),
        (E, "retain_result=cut.json", "not whole JSON"),
        (E, "retain_result=other.json", "no evaluation log"),
        (E, "retain_result=short.json", "different rows"),
        (E, "retain_result=auto", "no evaluation of a model finetuned on retain"),
        (E, "retain_result=auto oracle=make", "does not say how it was finetuned"),
        (E, "retain_result={forget99:x}", "and none for split="),
        (E, "oracle=make", "needs retain_result=auto"),
        (A, "ckpt_result=none.json", "no such file"),
        (A, "ckpt_result=cut.json", "not whole JSON"),
        (A, "save_file=model", "is a folder"),
        (A, "save_file=short.json", "is one of the two logs"),
        (E, "start_result=nothing", "holds no evaluation"),
        (E, "start_result=short.json", "different rows"),
        (E, "metrics=fluency fluency.by=classifier fluency.classifier=nowhere/at/all", "no such folder"),
        (E, "metrics=fluency fluency.by=classifier fluency.classifier=model", "no classifier of texts"),
        (E, "fluency.model=no_config", "holds no model"),
        (C, "results=[short.json]", "a list of two evaluations"),
        (C, "results=[nothing,nothing]", "no such file"),
        (C, "results=[short.json,short.json]", "is no metrics.json"),
        (R, "nothing", "no evaluation in it"),
        (R, "results=[nowhere]", "no such file or folder"),
        (R, "short.json results=[mini]", "name all of them in one list"),
        (R, "short.json save_dir=taken", "holds something else than a report"),
        (R, "line.csv metrics=[Model]", "metrics=Model is unknown"),
        (R, "line.csv group_by=[loss]", "group_by=loss is no key"),
        (R, "line.csv baseline=dpo", "baseline=dpo is unknown"),
        (R, "short.json format=xlsx", "format=xlsx is unknown"),
        (R, "short.json retain_result=none.json", "no such file"),
    ],
}
