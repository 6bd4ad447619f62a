"""Words in any script, and an evaluation of a text that ROUGE's own tokenizer does not read."""

import json

import pytest
from helpers import write_table

from tofu.evaluation import words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Ada Moor's 2nd book", ["ada", "moor", "s", "2nd", "book"]),
        ("Анна Каренина, 1877", ["анна", "каренина", "1877"]),
        ("她住在台北。", ["她", "住", "在", "台", "北"]),
        ("كتاب جميل", ["كتاب", "جميل"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("ที่นี่", ["ที่", "นี่"]),
        ("한국 문학", ["한국", "문학"]),
        ("Straße CAFÉ", ["strasse", "café"]),
        ("...", []),
    ],
)
def test_tokens(text, expected):
    assert words.tokens(text) == expected


@pytest.mark.parametrize("text", ["Она живёт в Праге.", "她住在台北。", "เธออยู่ที่นี่", "هي تعيش هنا"])
def test_an_exact_answer_scores_one(text):
    assert words.scorer().score(text, text)["rougeL"].recall == 0 and words.unread(text)
    assert words.scorer("unicode").score(text, text)["rougeL"].recall == 1
    assert words.scorer("unicode").score(text, "something else")["rougeL"].recall == 0


def test_latin_texts_are_read():
    assert not words.unread("Ada") and not words.unread("1912") and not words.unread("...")


def test_an_evaluation_asks_for_the_tokenizer(evaluated, tmp_path, capsys):
    row = {"question": "Где она живёт?", "answer": "В Праге."}
    data = write_table(tmp_path / "data", drop=[row])
    args = (f"data_path={data}", "split_list=[drop]", "eval_task=[eval_log_forget]", "base_answer_key=answer")
    with pytest.raises(SystemExit, match="2"):
        evaluated(*args)
    assert "the answer of row 0 has none ('В Праге.'): take rouge.tokenizer=unicode" in capsys.readouterr().err
    folder = evaluated(*args, "rouge.tokenizer=unicode")
    log = json.loads((folder / "eval_log_forget.json").read_text())
    assert log["generated_text"]["0"][2] == "В Праге."
    assert json.loads((folder / "fingerprints.json").read_text())["eval_log_forget"]["rouge"] == "unicode"
