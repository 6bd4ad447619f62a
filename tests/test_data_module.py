"""Encoding, collation, and who trains on what when."""

import dataclasses
import json

import datasets
import numpy as np
import pytest
import torch
from helpers import MINI, read_table, write_table

import data_module
import utils
from data_module import IGNORE, GlobalBatches, Sample, Slot, TrainingSet
from tofu.methods import altpo
from tofu.models import batches, families, folders, forward, loading
from utils import BadInput

FAMILY = families.family("tiny")


@pytest.fixture(scope="module")
def tokenizer(model_folder):
    return folders.load_tokenizer(str(model_folder), None)


def test_encode_scores_the_answer_and_one_end_token(tokenizer):
    sample = data_module.encode(tokenizer, FAMILY, "Who?", "The answer is Bo.", 100)
    scored = [token for token in sample.targets if token != IGNORE]
    assert tokenizer.decode(scored) == "The answer is Bo.</s>"
    assert tokenizer.decode(sample.input_ids) == "<s>Question: Who?\nThe answer is Bo."
    assert len(sample.input_ids) == len(sample.targets)
    assert sample.targets[-2] == sample.input_ids[-1] and not sample.cut


def test_encode_scores_the_answer_tag(tokenizer):
    """phi's answer tag belongs to the answer, as in the benchmark."""
    sample = data_module.encode(tokenizer, families.family("phi"), "Who?", "Bo.", 100)
    assert tokenizer.decode([t for t in sample.targets if t != IGNORE]) == "Answer: Bo.</s>"


def test_a_cut_answer_gets_no_end_token(tokenizer):
    whole = data_module.encode(tokenizer, FAMILY, "Who?", "The answer is Bo.", 100)
    cut = data_module.encode(tokenizer, FAMILY, "Who?", "The answer is Bo.", len(whole.input_ids) - 1)
    assert cut.cut and tokenizer.eos_token_id not in cut.targets
    assert whole.input_ids[: len(cut.input_ids)] == cut.input_ids
    assert cut.targets == whole.targets[: len(cut.targets)]


def test_encode_refuses_a_prompt_without_room(tokenizer):
    with pytest.raises(BadInput, match="max_length=5 leaves no token of an answer"):
        data_module.encode(tokenizer, FAMILY, "Who is this?", "Bo.", 5)


def places(batch):
    """Of each scored position, part after part: (row, column, sample, label)."""
    width = batch["input_ids"].shape[1]
    rows = zip(batch["at"].tolist(), batch["sample"].tolist(), batch["labels"].tolist(), strict=True)
    found = [(*divmod(at, width), sample, label) for at, sample, label in rows]
    return {name: found[slice(*block.scored)] for name, block in batch["blocks"].items()}


def test_collate_masks_by_length_and_keeps_what_is_scored():
    """An id that is the padding's in the middle of a prompt stays visible."""
    long, short = Sample([1, 0, 5, 6], [IGNORE, IGNORE, 6, 2], False), Sample([1, 7], [IGNORE, 2], False)
    batch = batches.collate({"forget": [long, short], "retain": [short, long]}, [1.0, 0.0], frozenset({"retain"}))
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch["parts"] == ("forget", "retain") and batch["weight"].tolist() == [1, 0]
    read = [(2, 0, 0, IGNORE), (2, 1, 0, 2), (3, 0, 1, IGNORE), (3, 1, 1, IGNORE), (3, 2, 1, 6), (3, 3, 1, 2)]
    assert places(batch) == {"forget": [(0, 2, 0, 6), (0, 3, 0, 2), (1, 1, 1, 2)], "retain": read}
    assert batch["answers"].tolist() == [1, 4, 5] and batch["tokens"] == 4 + 2
    assert batch["blocks"]["forget"].tokens == (0, 8) and batch["blocks"]["retain"].tokens == (8, 16)
    wide = batches.collate({"forget": [long, short]}, round_to=16)
    assert wide["input_ids"].shape == (2, 16) and wide["attention_mask"].sum(1).tolist() == [4, 2]
    assert places(wide) == {"forget": places(batch)["forget"]}


def test_packed_rows_hold_each_sample_once_and_restart_its_positions():
    """Two rows a part for two samples of 4 and 2 and row=4; the shorter row's rest is a sample of its own."""
    long, short = Sample((1, 3, 5, 6), (IGNORE, IGNORE, 6, 2), False), Sample((1, 7), (IGNORE, 2), False)
    parts = {"forget": [long, short, short], "retain": [short, long, short]}
    batch = batches.collate(parts, [1.0, 0.0, 1.0], frozenset({"retain"}), row=4)
    assert batch["input_ids"].tolist() == [[1, 3, 5, 6], [1, 7, 1, 7], [1, 3, 5, 6], [1, 7, 1, 7]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3], [0, 1, 0, 1]] * 2
    forget = [(0, 2, 0, 6), (0, 3, 0, 2), (1, 1, 1, 2), (1, 3, 2, 2)]
    assert places(batch)["forget"] == forget and "attention_mask" not in batch
    assert [one[:3] for one in places(batch)["retain"]] == [
        *((2, 0, 1), (2, 1, 1), (2, 2, 1), (2, 3, 1), (3, 0, 0), (3, 1, 0), (3, 2, 2), (3, 3, 2))
    ]
    assert batch["answers"].tolist() == [2, 3, 5, 7] and batch["blocks"]["retain"].tokens == (8, 16)
    one = batches.collate(parts, [1.0, 0.0, 1.0], frozenset({"retain"}), row=data_module.ONE_ROW)
    assert one["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 0, 1] * 2]
    assert [one["blocks"][name].tokens for name in parts] == [(0, 8), (8, 16)]
    assert [one["blocks"][name].samples for name in parts] == [(0, 3), (3, 6)]
    assert one["cu_seqlens"].tolist() == [0, 4, 6, 8, 12, 14, 16] and one["longest"] == 4
    assert [column for _, column, *_ in places(one)["forget"]] == [2, 3, 5, 7]
    filled = batches.collate({"forget": [long, short]}, row=data_module.ONE_ROW, round_to=16)
    assert filled["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, *range(10)]]
    assert filled["cu_seqlens"].tolist() == [0, 4, 6, 16] and filled["longest"] == 10
    short_row = batches.collate({"forget": [long, short]}, row=4)
    assert short_row["position_ids"].tolist() == [[0, 1, 2, 3], [0, 1, 0, 1]]
    assert places(short_row) == {"forget": forget[:3]}


def test_packed_rows_are_nearly_equal(tokenizer):
    """Rows of real lengths: at most a tenth of a rectangle is filler."""
    lengths = [len(one["question"]) + len(one["answer"]) for one in read_table("full")]
    for first in range(0, 320, 16):
        batch = lengths[first : first + 16]
        rows = data_module.packed(batch, 500)
        assert sorted(i for row in rows for i in row) == list(range(16))
        sums = [sum(batch[i] for i in row) for row in rows]
        assert len(rows) == -(-sum(batch) // 500) and max(sums) * len(rows) <= 1.1 * sum(batch)


def test_steps_dealt_by_length_hold_the_same_rows():
    lengths = np.random.default_rng(0).permutation(41).tolist()

    def steps(length):
        ranks = [list(GlobalBatches(41, 2, rank, 2, 4, length)) for rank in range(2)]
        micro = [[s for r in ranks for s in r[k] if s.weight] for k in range(len(ranks[0]))]
        return [sum(micro[k : k + 4], []) for k in range(0, len(micro), 4)]

    plain, dealt = steps(None), steps(lambda slot: lengths[slot.position])
    assert [sorted(step) for step in plain] == [sorted(step) for step in dealt] and plain != dealt
    for step in dealt:
        found = [lengths[slot.position] for slot in step]
        assert all(max(found[k : k + 4]) <= min(found[k + 4 :], default=99) for k in range(0, len(found), 4))


@pytest.mark.parametrize(("n", "world", "size"), [(40, 1, 16), (40, 2, 8), (41, 2, 4), (41, 3, 5), (7, 4, 2)])
def test_every_row_once_and_ranks_in_step(n, world, size):
    ranks = [list(GlobalBatches(n, size, rank, world)) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1 and all(len(b) == size for r in ranks for b in r)
    counted = [slot.position for batches in ranks for batch in batches for slot in batch if slot.weight]
    assert sorted(counted) == list(range(n))


def test_a_step_holds_the_same_rows_whatever_the_processes():
    def steps(world, size, accumulation):
        ranks = [list(GlobalBatches(41, size, rank, world)) for rank in range(world)]
        micro = [[s.position for r in ranks for s in r[k] if s.weight] for k in range(len(ranks[0]))]
        return [sorted(sum(micro[k : k + accumulation], [])) for k in range(0, len(micro), accumulation)]

    assert steps(1, 16, 1) == steps(2, 8, 1) == steps(2, 2, 4) == steps(1, 4, 4)


def test_retain_rows_are_used_equally_often(tokenizer):
    rows = read_table("retain90")[:10]
    data = TrainingSet(tokenizer, FAMILY, 100, 0, forget=read_table("forget01"), retain=rows)
    ids = [data.rows["retain"].index(data[Slot(epoch, p, 1.0)][0]["retain"]) for epoch in range(5) for p in range(4)]
    assert sorted(ids[:10]) == sorted(ids[10:]) == list(range(10))


def test_samples_depend_on_seed_and_epoch_alone(tokenizer):
    def refusals(seed, epoch):
        data = TrainingSet(
            tokenizer, FAMILY, 100, seed, forget=read_table("forget10"), refusals=["No.", "I do not know.", "?"]
        )
        return [data[Slot(epoch, p, 1.0)][0]["idk"] for p in range(40)]

    assert refusals(0, 0) == refusals(0, 0)
    assert refusals(0, 0) != refusals(0, 1) and refusals(0, 0) != refusals(1, 0)


def test_load_rows_refuses(tmp_path):
    with pytest.raises(BadInput, match="split=forget20 is not in .*it has .*forget01"):
        data_module.load_rows(str(MINI), "forget20", ("question",))
    with pytest.raises(BadInput, match="no column paraphrased_answer"):
        data_module.load_rows(str(MINI), "full", ("question", "paraphrased_answer"))
    with pytest.raises(BadInput, match="data_path=.*no such folder"):
        data_module.load_rows(str(tmp_path / "none"), "full", ("question",))
    own = write_table(tmp_path / "own", mine=[{"question": "Q?", "answer": "A."}] * 3)
    assert len(data_module.load_rows(str(own), "mine", ("question", "answer"), 2)) == 2


def test_unreadable_data_is_told_in_one_line(tmp_path, capfd):
    """A file, a folder without data, broken JSON: the key, the split and the cause; datasets itself stays silent."""
    (tmp_path / "empty").mkdir()
    broken = write_table(tmp_path / "broken", full=[{"question": "Q?"}])
    (broken / "full.json").write_text('{"question": "Q')
    for path, cause in (
        (MINI / "full.json", "is a file: name the folder"),
        (tmp_path / "empty", r"split=full cannot be read \(EmptyDatasetError: .*doesn't contain any data files"),
        (broken, r"full.json cannot be read as JSON lines, nor as one list \(Unterminated string"),
    ):
        with pytest.raises(BadInput, match=f"{path}.*{cause}") as error:
            data_module.load_rows(str(path), "full", ("question",))
        assert "\n" not in str(error.value)
    assert "Generating" not in "".join(capfd.readouterr())


PAIR = {"question": "Who?", "answer": "Bo."}


class TestFilesAreSplits:
    """A folder of files has the splits that its file names say."""

    def test_each_kind_of_file(self, tmp_path):
        (tmp_path / "drop.jsonl").write_text(json.dumps(PAIR) + "\n\n" + json.dumps({**PAIR, "answer": "NA"}) + "\n")
        (tmp_path / "keep.json").write_text(json.dumps([PAIR, PAIR], indent=1))
        (tmp_path / "sheet.csv").write_bytes('\ufeffquestion,answer\n"Who, \u2028me?",42\nWho?,NA\n'.encode())
        datasets.Dataset.from_list([PAIR]).to_parquet(tmp_path / "big.parquet")
        datasets.Dataset.from_list([PAIR] * 3).save_to_disk(tmp_path / "saved")
        assert utils.local_splits(str(tmp_path)) == ["big", "drop", "keep", "saved", "sheet"]
        load = lambda split: data_module.load_pairs(str(tmp_path), split, "question", "answer")  # noqa: E731
        assert load("drop") == [PAIR, {**PAIR, "answer": "NA"}] and load("keep") == [PAIR] * 2
        assert load("sheet") == [{"question": "Who, \u2028me?", "answer": "42"}, {"question": "Who?", "answer": "NA"}]
        assert load("big") == [PAIR] and load("saved") == [PAIR] * 3
        with pytest.raises(BadInput, match="split=default is not in .*: it has big, drop, keep, saved, sheet"):
            load("default")

    def test_a_saved_dict_and_one_set(self, tmp_path):
        one = datasets.Dataset.from_list([PAIR])
        datasets.DatasetDict(drop=one, keep=one).save_to_disk(tmp_path / "dict")
        one.save_to_disk(tmp_path / "one")
        assert data_module.load_rows(str(tmp_path / "dict"), "keep", ("answer",)) == [{"answer": "Bo."}]
        assert data_module.load_rows(str(tmp_path / "one"), "train", ("answer",)) == [{"answer": "Bo."}]

    def test_a_file_beside_those_that_a_card_names(self, tmp_path):
        own = write_table(tmp_path, mine=[PAIR])
        (own / "more.jsonl").write_text(json.dumps(PAIR))
        assert utils.local_splits(str(own)) == ["mine", "more"]

    @pytest.mark.parametrize(
        ("name", "content", "said"),
        [
            ("x.csv", b"", "x.csv is empty: its first line must name the columns"),
            ("x.csv", b"question,answer\n", ", x: no rows"),
            ("x.csv", b"question,answer\nWho?\n", "row 0 has not as many fields"),
            ("x.csv", b"question,answer\nWho?,Bo.,Bo.\n", "row 0 has not as many fields"),
            ("x.csv", b"question,answer\nWho?,\n", "the answer of row 0 is empty"),
            ("x.jsonl", '{"question": "Qu\u00e9?", "answer": "b"}'.encode("latin-1"), "x.jsonl is not UTF-8 (byte 16)"),
            ("x.jsonl", b"[1, 2]", "row 0 is no object with named columns: '1'"),
            ("x.jsonl", b'{"question": "Who?", "answer": null}', "the answer of row 0 is None, no text"),
            ("x.jsonl", b'{"question": "Who?", "answer": 1912}', "the answer of row 0 is 1912, no text"),
            ("x.jsonl", b'{"question": "Who?", "answer": ["Bo."]}', "the answer of row 0 is ['Bo.'], no text"),
            ("x.jsonl", b'{"question": " ", "answer": "Bo."}', "the question of row 0 is empty"),
            ("x.jsonl", b'{"q": "Who?", "a": "Bo."}', "no column question, answer (it has q, a)"),
            ("x.parquet", b"PAR1", "cannot be read"),
        ],
    )
    def test_refusals(self, tmp_path, name, content, said):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadInput) as error:
            data_module.load_pairs(str(tmp_path), "x", "question", "answer")
        assert said in str(error.value) and "\n" not in str(error.value)

    def test_two_files_of_one_name(self, tmp_path):
        for name in ("x.csv", "x.json"):
            (tmp_path / name).write_text("")
        with pytest.raises(BadInput, match="two files of a split x: x.csv and x.json"):
            data_module.load_rows(str(tmp_path), "x", ("answer",))


def test_rows_to_forget_and_to_keep_are_apart():
    rows = read_table("full")
    data_module.check_apart(rows[-4:], rows[:-4], "forget10", "retain90")
    with pytest.raises(BadInput, match="retain_split=full holds 4 of the 4 rows to forget, split=forget10"):
        data_module.check_apart(rows[-4:], rows, "forget10", "full")


def test_first_rows_are_the_first(tokenizer):
    rows = data_module.load_rows(str(MINI), "forget10", ("question", "answer"), 5)
    assert rows == read_table("forget10")[:5]


def test_score_equals_the_models_own_loss(model_folder, tokenizer):
    """Padded rows, logits at scored positions only: transformers' loss over the same labels, to 1e-5."""
    model = loading.load(str(model_folder)).eval()
    rows = read_table("forget01")
    samples = [data_module.encode(tokenizer, FAMILY, row["question"], row["answer"], 200) for row in rows]
    view = forward.score(model, batches.collate({"forget": samples}))["forget"]
    nll = torch.nn.functional.cross_entropy(view.logits, view.labels, reduction="none")
    for i, sample in enumerate(samples):
        ids = torch.tensor([[*sample.input_ids, tokenizer.eos_token_id]])
        labels = torch.tensor([[IGNORE, *sample.targets]])
        expected = model(ids, labels=labels).loss
        torch.testing.assert_close(nll[view.sample == i].mean(), expected, rtol=0, atol=1e-5)


def test_rows_are_those_of_this_folder_now(tmp_path):
    """Two folders of one name, and rows edited in place: a library's cache must not answer for either."""
    for name, answer in (("a", "one"), ("b", "two"), ("b", "three")):
        folder = write_table(tmp_path / name / "data", mine=[{"question": "Q?", "answer": answer}])
        assert data_module.load_rows(str(folder), "mine", ("answer",)) == [{"answer": answer}]


def test_states_are_kept_where_answers_are_read():
    """The end token is read too, and what is kept is one place later than what is predicted; packed and padded."""
    long, short = Sample((1, 3, 5, 6), (IGNORE, IGNORE, 6, 2), False), Sample((1, 7), (IGNORE, 2), False)
    parts, states = {"forget": [long, short], "retain": [short, long]}, frozenset({"forget"})
    padded = batches.collate(parts, states=states)
    assert padded["input_ids"].tolist() == [[1, 3, 5, 6, 2], [1, 7, 2, 0, 0], [1, 7, 0, 0, 0], [1, 3, 5, 6, 0]]
    where = {name: [one[:2] for one in found] for name, found in places(padded).items()}
    assert where == {"forget": [(0, 3), (0, 4), (1, 2)], "retain": [(2, 1), (3, 2), (3, 3)]}
    assert padded["states"] == ("forget",)
    both = batches.collate(parts, row=data_module.ONE_ROW, states=frozenset(parts))
    assert both["input_ids"].tolist() == [[1, 3, 5, 6, 2, 1, 7, 2, 1, 3, 5, 6, 2, 1, 7, 2]]
    assert both["at"].tolist() == [3, 4, 7, 11, 12, 15]
    mixed = batches.collate(parts, row=data_module.ONE_ROW, states=states)
    assert mixed["at"].tolist() == [3, 4, 7, 10, 11, 13]


def test_alternates_stand_in_for_refusals(tokenizer, tmp_path):
    """One a line of the file, paired with its own question in every epoch."""
    rows = [{key: row[key] for key in ("question", "answer")} for row in read_table("forget01")]
    path = tmp_path / "alternates.jsonl"
    lines = [{**row, "alternate": f"No {k}."} for row in rows for k in (1, 2)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    forget, alternates = altpo.load_alternates(str(path), rows)
    data = TrainingSet(tokenizer, FAMILY, 500, 1, forget=forget, alternates=alternates)
    assert len(data) == 8
    for slot in (Slot(epoch, place, 1.0) for epoch in range(2) for place in range(8)):
        parts, _ = data[slot]
        row = data.rows["forget"].index(parts["forget"]) // 2
        wrong = [data_module.encode(tokenizer, FAMILY, rows[row]["question"], f"No {k}.", 500) for k in (1, 2)]
        assert parts["idk"] in wrong
    for bad, said in (("{", "cannot be read"), ('{"question": "Who?"}', "KeyError")):
        path.write_text(bad)
        with pytest.raises(BadInput, match=said):
            altpo.load_alternates(str(path), rows)


def ending(tokenizer, folder, end: str):
    """The same tokenizer, which ends every text with the special token `end` by itself."""
    from tokenizers import processors

    tokenizer = folders.load_tokenizer(tokenizer.name_or_path, None)
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", end)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"<s> $A {end}", special_tokens=special
    )
    tokenizer.save_pretrained(folder)
    return folders.load_tokenizer(str(folder), None)


@pytest.mark.parametrize("end", ["</s>", "<unk>"])  # the answer's own end token, and another one
def test_an_end_token_that_a_tokenizer_adds_is_never_read(tokenizer, tmp_path, end):
    """Neither in what is trained on nor in what a model is asked: after it nothing would be answered."""
    adds = ending(tokenizer, tmp_path, end)
    assert adds("Who?")["input_ids"][-1] == adds.convert_tokens_to_ids(end)
    for question, answer in (("Who?", "Bo."), ("Who is\n", "The answer is Bo. "), ("日本</s>?", "é</s>")):
        assert data_module.encode(adds, FAMILY, question, answer, 100) == data_module.encode(
            tokenizer, FAMILY, question, answer, 100
        )
        asked = data_module.prompt_ids(adds, FAMILY, question)
        assert asked == data_module.prompt_ids(tokenizer, FAMILY, question)
        assert asked == tokenizer(data_module.prompt(FAMILY, question))["input_ids"]


def byte_level(folder, *special: str):
    """A byte-level BPE, as of GPT-2, Pythia and Llama 3: a space belongs to the word behind it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    text = [f"Question: {row['question']}\nAnswer: {row['answer']}" for row in read_table("full")]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=list(special), initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    bpe.train_from_iterator(text, trainer)
    end = special[-1]
    PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token=end, eos_token=end).save_pretrained(folder)
    return folders.load_tokenizer(str(folder), end)  # the end token is the unknown token: Phi's, Pythia's, SmolLM's


def test_a_model_is_asked_what_it_was_trained_on(tmp_path):
    """A tag's last space merges with the answer's first word: the prompt alone would be what was never seen."""
    tokenizer = byte_level(tmp_path, "<|endoftext|>")
    family = dataclasses.replace(FAMILY, question_end_tag="\nAnswer: ", answer_tag="")
    merged = 0
    for row in read_table("full"):
        sample = data_module.encode(tokenizer, family, row["question"], row["answer"], 500)
        asked = data_module.asked(sample)
        assert asked == list(sample.input_ids[: len(asked)]) and sample.targets[len(asked) - 1] != IGNORE
        assert data_module.prompt_ids(tokenizer, family, row["question"]) == asked
        alone = tokenizer(data_module.prompt(family, row["question"]))["input_ids"]
        merged += list(sample.input_ids[: len(alone)]) != alone
        scored = [target for target in sample.targets if target != IGNORE]
        assert tokenizer.decode(scored[:-1]).strip() == row["answer"] and scored[-1] == tokenizer.eos_token_id
    assert merged == len(read_table("full"))


def test_a_begin_token_in_a_tag_and_from_the_tokenizer_is_read_once(tokenizer):
    family = dataclasses.replace(FAMILY, question_start_tag=f"<s>{FAMILY.question_start_tag}")
    twice = tokenizer(data_module.prompt(family, "Who?"))["input_ids"]
    assert twice[:2] == [tokenizer.bos_token_id] * 2
    for made in (data_module.encode, lambda *args: data_module.prompt_ids(*args[:3])):
        assert made(tokenizer, family, "Who?", "Bo.", 100) == made(tokenizer, FAMILY, "Who?", "Bo.", 100)


def test_an_answer_written_with_its_end_has_one(tokenizer):
    one, two = (data_module.encode(tokenizer, FAMILY, "Who?", answer, 100) for answer in ("Bo.", "Bo.</s>"))
    assert one == two
