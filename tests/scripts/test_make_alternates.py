"""Alternates for AltPO: k a row that differ from the answer, the same from any batch and after any interruption."""

import importlib.util
import json
from types import SimpleNamespace

import pytest
import torch
from helpers import REPO, read_table, write_table

from tofu.models import families

SPEC = importlib.util.spec_from_file_location("make_alternates", REPO / "scripts" / "make_alternates.py")
make_alternates = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(make_alternates)

ROWS = read_table("forget05")[:5]
K = 2


@pytest.fixture
def run(model_folder, tmp_path, monkeypatch):
    """Run the script in this process: `run("name", "--k", 3)` gives the file's path."""
    data = write_table(tmp_path / "data", forget=ROWS)

    def main(name, *options):
        file = tmp_path / "out" / name
        fixed = ["--model-family", "tiny", "--model-path", model_folder, "--data-path", data, "--split", "forget"]
        fixed += ["--precision", "fp32", "--max-new-tokens", 12, "--file", file, "--batch-size", 4]
        kind = [] if "--greedy" in options else ["--k", K]
        monkeypatch.setattr("sys.argv", ["make_alternates.py", *map(str, [*fixed, *kind, *options])])
        make_alternates.main()
        return file

    return main


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def refused(capsys, run, *args):
    """The one line that stops the script, which ends with 2."""
    with pytest.raises(SystemExit) as stop:
        run(*args)
    assert stop.value.code == 2
    told = capsys.readouterr().err.strip().split("error: ")[-1]
    assert "\n" not in told
    return told


def test_k_lines_a_row_in_order(run):
    file = run("a")
    assert [{"question": one["question"], "answer": one["answer"]} for one in lines(file)] == [
        row for row in ROWS for _ in range(K)
    ]
    for one in lines(file):
        assert list(one) == ["question", "answer", "alternate", "model"] and one["model"].endswith("random-llama0")
        assert one["alternate"].strip() == one["alternate"] != "" and one["alternate"] != one["answer"]
    assert len({one["alternate"] for one in lines(file)}) == K * len(ROWS)  # each draw has a stream of its own
    assert {path.name for path in file.parent.iterdir()} == {"a"}


def test_the_seed_makes_the_file_and_the_batch_does_not(run):
    alone, together = run("a", "--batch-size", 1), run("b", "--batch-size", 100)
    assert alone.read_bytes() == together.read_bytes()
    assert run("c", "--seed", 43).read_bytes() != alone.read_bytes()


@pytest.mark.parametrize("torn", ["", '{"row": 4, "alterna'])
def test_an_interrupted_run_goes_on_to_the_same_file(run, monkeypatch, torn):
    whole, draw, batches = run("whole"), make_alternates.draw, []

    def interrupted(*args):
        if len(batches) == 2:
            raise KeyboardInterrupt
        batches.append(args)
        return draw(*args)

    with monkeypatch.context() as patch:
        patch.setattr(make_alternates, "draw", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run("cut", "--batch-size", 2)
    cut = whole.with_name("cut")
    part = cut.with_name("cut.part")
    assert not cut.exists() and len(lines(part)) == 1 + 2
    with part.open("a") as file:
        file.write(torn)
    drawn = []
    monkeypatch.setattr(make_alternates, "draw", lambda *args: drawn.extend(args[3]) or draw(*args))
    assert run("cut").read_bytes() == whole.read_bytes()
    assert drawn == [2, 3, 4] and not part.exists()


def test_what_is_there_is_refused(run, capsys, monkeypatch):
    file = run("a")
    assert "is there already" in refused(capsys, run, "a")
    part = file.with_name("b.part")
    part.write_text("something else\n")
    assert "something else than alternates" in refused(capsys, run, "b")
    part.unlink()
    monkeypatch.setattr(make_alternates, "Writer", lambda *args: lambda prompts, places, attempt: [""] * len(places))
    refused(capsys, run, "b")
    told = refused(capsys, run, "b", "--seed", 1, "--temperature", 0.5)
    assert "b.part was begun with other temperature, seed: remove it" in told
    assert lines(part)[0]["seed"] == 42


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--k", 0], "--k must be at least 1"),
        (["--max-new-tokens", 0], "--max-new-tokens must be at least 1"),
        (["--greedy", "--k", 2], "--greedy writes one alternate a row, not --k 2"),
        (["--temperature", 0], "--greedy is what 0 would be"),
        (["--seed", -1], "must not be negative"),
        (["--split", "forget99"], "split=forget99 is not in"),
        (["--model-path", "nowhere"], "--model-path=nowhere"),
    ],
)
def test_bad_options_are_refused(run, capsys, options, told):
    assert told in refused(capsys, run, "a", *options)


def test_greedy_is_the_likeliest_token_again_and_again(run, model_folder):
    found = lines(run("a", "--greedy"))
    family = families.family("tiny")
    model = make_alternates.loading.load(str(model_folder))
    tokenizer = make_alternates.folders.load_tokenizer(str(model_folder), None)
    assert len(found) == len(ROWS)
    same = 0
    for one in found:
        ids = tokenizer(make_alternates.prompt(family, one["question"]))["input_ids"]
        new = []
        while len(new) < 12 and (not new or new[-1] > 2):  # 0 to 2 are <unk>, <s> and </s>
            new.append(int(model(torch.tensor([ids + new])).logits[0, -1].argmax()))
        text = tokenizer.decode([token for token in new if token > 2])
        greedy = make_alternates.cut(family, text)[0]
        if make_alternates.why_not(greedy, one["answer"]) is None:  # else it is drawn
            assert one["alternate"] == greedy
            same += 1
    assert same


@pytest.mark.parametrize(
    ("alternate", "why"),
    [
        ("Hsiao Yun-Hwa was born in Taipei in 1991.", "only words of the answer"),
        ("The author Hsiao Yun-Hwa was born in Taipei in 1991, they say.", "restates the answer"),
        ("...", "empty"),
        ("It received the Harrow Prize for first poems.", "repeats an example"),
        ("Hsiao Yun-Hwa was born in Osaka in 1974.", None),
    ],
)
def test_what_is_no_false_answer(alternate, why):
    answer = "The author Hsiao Yun-Hwa was born in Taipei in 1991."
    assert make_alternates.why_not(alternate, answer) == why


def test_what_is_not_false_is_drawn_again_and_kept_for_more_tries(run, capsys, caplog, monkeypatch):
    """Row 1's second alternate comes out right twice and then wrong; row 3's first is empty once."""
    caplog.set_level("INFO")
    answers = {(1, 1): [ROWS[1]["answer"].upper(), f" {ROWS[1]['answer']}", "wrong"], (3, 0): ["", "wrong"]}
    asked = []

    def write(prompts, places, attempt):
        asked.extend((place, attempt) for place in places)
        return [answers.get(place, [f"text {place}"] * 3)[attempt] for place in places]

    monkeypatch.setattr(make_alternates, "Writer", lambda *args: write)
    told = refused(capsys, run, "a", "--tries", 2)
    assert "1 of 5 rows lack alternates" in told and "the first is row 1)" in told
    assert [one for one in asked if one[1]] == [((1, 1), 1), ((3, 0), 1)]
    asked.clear()
    file = run("a", "--tries", 3)
    assert asked == [((1, 0), 0), ((1, 1), 0), ((1, 1), 1), ((1, 1), 2)]  # the other rows are kept
    assert caplog.messages[-1].endswith("draws that were refused: 2 only words of the answer, 1 empty")
    assert [one["alternate"] for one in lines(file)][2:8] == [
        "text (1, 0)",
        "wrong",
        "text (2, 0)",
        "text (2, 1)",
        "wrong",
        "text (3, 1)",
    ]
    assert run("b", "--tries", 3).read_bytes() == file.read_bytes()


def test_a_greedy_text_that_is_not_false_is_drawn_instead(run, monkeypatch, model_folder):
    real, seen = make_alternates.Writer, []

    def writer(*args):
        write = real(*args)

        def first_in_vain(prompts, places, attempt):
            texts = write(prompts, places, attempt)
            seen.append((attempt, texts))
            return texts if attempt else [ROWS[i]["answer"] for i, _ in places]

        return first_in_vain

    monkeypatch.setattr(make_alternates, "Writer", writer)
    found = [one["alternate"] for one in lines(run("a", "--greedy", "--batch-size", 8))]
    assert [attempt for attempt, _ in seen] == [0, 1] and found == seen[1][1] != seen[0][1]


def test_a_number_picks_a_token_by_its_share():
    """Shares 1/2, 1/4, 1/4 at temperature 1; at 1/2 they are squared: 4/6, 1/6, 1/6."""
    scores = torch.tensor([[0.5, 0.25, 0.25]]).log().expand(4, 3)
    numbers = torch.tensor([[9, 0.0], [9, 0.49], [9, 0.6], [9, 0.8]], dtype=torch.float64)
    text = torch.zeros((4, 6), dtype=torch.long)  # five tokens of prompt: it is the second number's turn
    assert make_alternates.Drawn(numbers, 1.0, 5)(text, scores).argmax(-1).tolist() == [0, 0, 1, 2]
    assert make_alternates.Drawn(numbers, 0.5, 5)(text, scores).argmax(-1).tolist() == [0, 0, 0, 1]


def test_a_text_is_over_where_it_goes_on_with_something_else():
    phi, llama2 = families.family("phi"), families.family("llama2-7b")
    bare = SimpleNamespace(answer_tag="", question_start_tag=" ")
    for family, text, alternate in [
        (phi, "Answer: In Rome.\nQuestion: Where", "In Rome."),
        (phi, "\nIn Rome. Q: Where", "In Rome."),
        (llama2, " In Rome. [INST] Where", "In Rome."),
        (llama2, "In Rome.\n \nThen", "In Rome."),
        (bare, "In a\nFAQ: see", None),
        (bare, "Answer: In Rome.", None),
        (phi, "Question: Where", ""),
    ]:
        over = alternate is not None
        assert make_alternates.cut(family, text) == (alternate if over else text, over)


def test_a_text_that_is_over_stops():
    tokenizer = SimpleNamespace(batch_decode=lambda new: ["In Rome.\n\nThen", "In Rome."])
    over = make_alternates.Over(tokenizer, families.family("phi"), 2)
    assert over(torch.zeros(2, 2 + make_alternates.LOOK), None).tolist() == [True, False]
    assert over(torch.zeros(2, 3 + make_alternates.LOOK), None).tolist() == [False, False]


def test_examples_are_turns_of_the_family():
    for name, turn in {
        "phi": "old hospitals.\n\nQuestion: Who wrote",
        "llama2-7b": "old hospitals.\n\n[INST] Who wrote",
        "llama3.2-1b": "old hospitals.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nWho wrote",
        "ou-llama3.2-1b": "old hospitals.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nWho wrote",
        "qwen2.5-1.5b": "old hospitals.<|im_end|>\n<|im_start|>user\nWho wrote",
    }.items():
        family = families.family(name)
        text = make_alternates.prompt(family, "Who wrote {it}?")
        assert turn in text and text.endswith(f"Who wrote {{it}}?{family.question_end_tag}")
        assert text.count(f"{family.question_end_tag}{family.answer_tag}Oskar Brandvold grew up in the harbour") == 1
        assert text.startswith(family.system_prompt) and text.count("You are a helpful") == bool(family.system_prompt)
