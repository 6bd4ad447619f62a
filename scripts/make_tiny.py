"""Build the embedded family `tiny` into data/tiny: a small Llama and its tokenizer, in a few minutes on a CPU.

    python scripts/make_tiny.py [--force]

It is pretrained on the true facts of data/mini (real authors, world facts) and on rows about invented authors of
another seed, who are in no split: so it can read questions and write answers, and knows nobody of `full`.
"""

import importlib.util
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainingArguments, set_seed

import data_module
import dataloader
from tofu.methods import objective
from tofu.models import families

REPO = Path(__file__).resolve().parents[1]

FOLDER = REPO / "data" / "tiny"
SEED, OTHER_AUTHORS, FACT_COPIES = 42, 7, 6
VOCABULARY, EPOCHS, LR = 2000, 4, 2e-3


def mini():
    """The generator of data/mini, for authors of another seed."""
    spec = importlib.util.spec_from_file_location("make_mini", REPO / "scripts" / "make_mini.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that begins every text with <s>."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def make_model(vocabulary: int) -> LlamaForCausalLM:
    """About a million weights, drawn from the seed."""
    set_seed(SEED)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=4,
            num_attention_heads=4,
            initializer_range=0.06,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def pretraining_rows() -> list[dict[str, str]]:
    """The true facts several times over, and other invented authors."""
    generator = mini()
    facts = generator.options(generator.REAL_AUTHORS) + generator.options(generator.WORLD_FACTS)
    splits = generator.tables()
    known = {one["question"] for split in ("full", "holdout10") for one in splits[split]}
    others = [
        row
        for k in range(OTHER_AUTHORS)
        for rows in generator.authors(9000 + k, 20)
        if known.isdisjoint(one["question"] for one in rows[1:])  # these name the author, and names can be drawn again
        for row in rows
    ]
    pairs = [(one["question"], one["answer"]) for one in facts * FACT_COPIES + others]
    pairs += [(one["paraphrased_question"], one["paraphrased_answer"]) for one in others]
    return [{"question": question, "answer": answer} for question, answer in pairs]


def main() -> None:
    """Build aside, then move the whole folder into place."""
    if (FOLDER / "config.json").is_file() and "--force" not in sys.argv[1:]:
        print(f"{FOLDER} is there already; --force builds it again")
        return
    rows = pretraining_rows()
    texts = [json.loads(line) for line in (REPO / "data" / "mini" / "full.json").read_text().splitlines()] + rows
    tokenizer = make_tokenizer([f"Question: {one['question']}\n{one['answer']}" for one in texts])
    data = data_module.TrainingSet(tokenizer, families.family("tiny"), 256, SEED, retain=rows)
    aside = Path(tempfile.mkdtemp(dir=FOLDER.parent, prefix=".tiny."))
    try:
        args = TrainingArguments(
            output_dir=str(aside),
            per_device_train_batch_size=64,
            num_train_epochs=EPOCHS,
            learning_rate=LR,
            lr_scheduler_type="cosine",
            warmup_steps=50,
            weight_decay=0.01,
            max_grad_norm=1.0,
            seed=SEED,
            report_to="none",
            save_strategy="no",
            logging_steps=100,
            disable_tqdm=True,
            remove_unused_columns=False,
            use_cpu=True,
        )
        model = make_model(len(tokenizer))
        dataloader.TofuTrainer(model=model, args=args, train_dataset=data, method=objective.finetuning()).train()
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        aside.chmod(0o755)
        shutil.rmtree(FOLDER, ignore_errors=True)
        os.replace(aside, FOLDER)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    print(f"built {FOLDER}: {model.num_parameters():,} weights")


if __name__ == "__main__":
    main()
