"""How many prompts are generated at once: what auto comes to, and that no row depends on it."""

import json
from types import SimpleNamespace

import pytest
import torch
from helpers import MINI, make, rows
from transformers import LlamaConfig

import data_module
from tofu.evaluation import evaluator, inference, logs, row_logs, sets, slots
from tofu.models import families, folders, loading

GB = 10**9


@pytest.fixture(scope="module")
def forget10(model_folder):
    """The forget set's 40 real rows, tokenised."""
    keys = ("question", "answer", "paraphrased_answer", "perturbed_answer")
    found = data_module.load_rows(str(MINI), "forget10_perturbed", keys)
    tokenizer = folders.load_tokenizer(str(model_folder), None)
    task = sets.prepare(sets.EvalSet(logs.FORGET, found, *keys), tokenizer, families.family("tiny"), max_length=64)
    return tokenizer, task


def test_no_row_depends_on_how_many_are_generated_at_once(forget10, model_folder, tmp_path):
    """1, 7, 30 and 256: the same rows in the same order, equal texts, losses within 1e-6; auto is 30 to the byte."""
    tokenizer, task = forget10
    model, found = loading.load(str(model_folder)), {}
    for size in (1, 7, 30, 256, "auto"):
        folder = tmp_path / str(size)
        evaluator.evaluate(model, tokenizer, [task], folder, batch_size=size)
        found[size] = (folder / f"{logs.FORGET}.json").read_bytes()
    assert found["auto"] == found[30]
    whole = json.loads(found[30])
    assert len({text for _, text, _ in whole["generated_text"].values()}) > 30
    for size in (1, 7, 256):
        log = json.loads(found[size])
        assert list(log["gt_loss"]) == list(whole["gt_loss"]) and log["generated_text"] == whole["generated_text"]
        for name in ("avg_gt_loss", "avg_paraphrased_loss", "average_perturb_loss"):
            for i, loss in whole[name].items():
                assert log[name][i] == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize("name", ["Llama", "GPTNeoX", "Qwen3", "Gemma2"])
def test_bytes_of_a_slot_are_the_caches(name, monkeypatch):
    """Grouped heads, a config without that key, heads of a width of their own, windows: as the cache allocates it."""
    layers, allocate = [], inference._Layer.lazy_initialization
    monkeypatch.setattr(
        inference._Layer, "lazy_initialization", lambda self, *states: (layers.append(self), allocate(self, *states))
    )
    model, prompts = make(name), [samples[0].input_ids for samples in rows(1)]
    with inference.ready(model, 64):
        inference.greedy(model, prompts, [9, 4, 12], [2], at_once=2)
    count, _, room, _ = layers[0].keys.shape
    real = sum(states.nbytes for layer in layers for states in (layer.keys, layer.values))
    assert slots.cache_bytes(model.config, model.dtype.itemsize, room) == real / count
    assert count == 2 and room >= max(len(prompt) for prompt in prompts) + inference.WIDEST


def test_what_a_slot_needs(forget10):
    """64 tokens and 8 drafts are 72, rounded up to 80; 2 layers of 2 heads of 8; two times 8 rows of 50 logits."""
    config = make("Llama").config
    per_slot, scored = slots.needs(config, 2, [forget10[1]])
    assert per_slot == 2 * 2 * 2 * 8 * 2 * 80 + 2 * 8 * 50 * 2
    assert scored == row_logs.SCORED_AT_ONCE * 50 * (4 + 2)
    config.vocab_size = 2**20  # 256 nodes have 2**28 logits
    assert slots.needs(config, 2, [forget10[1]])[1] == 256 * 2**20 * 6


@pytest.mark.parametrize(
    ("free", "per_slot", "count"),
    [
        (70 * GB, 30_000_000, 256),  # an 8B model on a card of 80 GB
        (4 * GB, 30_000_000, 66),
        (1.2 * GB, 30_000_000, 30),  # half of it would be 20
        (0.5 * GB, 30_000_000, 14),  # 0.45 GB
        (0.05 * GB, 30_000_000, 1),
        (0, 30_000_000, 1),
        (-GB, 30_000_000, 1),  # scoring needs more than there is
    ],
)
def test_slots_by_hand(free, per_slot, count):
    assert slots.slots(int(free), per_slot) == count


def test_a_number_is_taken_as_it_is():
    model = make("Llama")
    assert slots.resolve(7, model, []) == (7, 1) and slots.resolve("auto", model, []) == (30, 1)


def test_all_ranks_take_what_the_fullest_card_holds(forget10, monkeypatch, caplog):
    """CUDA's part but for the question how much is free, on the shapes of an 8B model."""
    config = LlamaConfig(num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, vocab_size=128256)
    model = SimpleNamespace(config=config, device=torch.device("cuda", 0), dtype=torch.bfloat16)
    monkeypatch.setattr(slots, "_free", lambda device: 60 * GB)
    caplog.set_level("INFO")
    assert slots.resolve("auto", model, [forget10[1]]) == (256, 1)
    assert caplog.messages == ["batch_size=auto: 256 slots, 14.6 MB each; 60.0 GB are free"]
    monkeypatch.setattr(slots.ranks, "merge", lambda found: {**found, 1: 44})
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert slots.resolve("auto", model, [forget10[1]]) == (44, 2)
    assert slots.resolve(7, model, [forget10[1]]) == (7, 1)


@pytest.mark.gpu
def test_auto_on_a_gpu(forget10, caplog):
    caplog.set_level("INFO")
    count, among = slots.resolve("auto", make("Llama").cuda(), [forget10[1]])
    assert (count, among) == (256, 1) and "batch_size=auto: 256 slots" in caplog.text


def test_batches_do_not_depend_on_ranks_where_a_number_is_asked_for():
    """300 prompts: batches of nearly equal size, of at most twice so many prompts as are in work."""
    assert row_logs.cut(300, 30, 1) == (5, 30) and row_logs.cut(300, 256, 1) == (1, 256)
    assert row_logs.cut(0, 30, 1) == (0, 30) and row_logs.cut(0, 30, 8)[0] == 0


@pytest.mark.parametrize("prompts", [1, 3, 100, 300, 3600])
@pytest.mark.parametrize("among", [2, 3, 8])
def test_no_rank_is_left_without_a_batch(prompts, among):
    parts, at_once = row_logs.cut(prompts, 256, among)
    assert parts == prompts or parts % among == 0  # each as many as the others
    assert parts >= min(among, prompts) and 1 <= at_once <= 256
    assert at_once >= min(256, prompts / among) and prompts <= parts * row_logs.REFILLS * at_once
