"""The report's page without a browser: what is in the file, where its numbers and texts come from, what it may do."""

import base64
import gzip
import hashlib
import json
import re
from pathlib import Path
from urllib.parse import unquote

import pytest
import sweep

import utils
from tofu.evaluation import logs
from tofu.reporting import generations, grouping, results, site

for package in ("pandas", "matplotlib", "itables", "plotly", "jinja2"):
    pytest.importorskip(package)
SCRIPT = re.compile(r'<script(?: type="([^"]*)")?(?: id="([^"]*)")?>(.*?)</script>', re.DOTALL)
HOSTILE = "</script><script>window.pwned=1</script><img src=x onerror='window.pwned=1'>&lt;\u2028"


def page_of(out: Path, *places) -> tuple[str, dict[str, str], results.Collected]:
    """A page written into a folder: its text, its script elements by id or kind, what was read."""
    found = results.collect(list(places))
    out.mkdir(exist_ok=True)
    site.write(out, {"save_dir": str(out)}, found, grouping.metrics_of(found.runs))
    text = (out / site.PAGE).read_text()
    return text, {id or f"code {n}": body for n, (_, id, body) in enumerate(SCRIPT.findall(text))}, found


def block(scripts: dict[str, str], id: str):
    return json.loads(gzip.decompress(base64.b64decode(scripts[id])))


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    top = tmp_path_factory.mktemp("site")
    sweep.sweep(top / "runs", splits=("forget10",), methods=("grad_ascent", "npo"), rates=(1e-4, 1e-5), seeds=(1, 2))
    return top, *page_of(top / "report", top / "runs")


def test_numbers_and_links(swept):
    """Each number is its metrics.json's, and its link, from the report's folder, leads there."""
    top, _, scripts, found = swept
    data = json.loads(scripts["data"])
    assert [run["name"] for run in data["runs"]] == [run.name for run in found.runs]
    shown = [column["name"] for column in data["columns"] if column["shown"]]
    assert shown[:6] == ["run", "state", "method", "lr", "step", "evaluated"] and "Model Utility" in shown
    for run, row in zip(found.runs, data["runs"], strict=True):
        for name, (value, file, _) in row["numbers"].items():
            assert value == run.value(name)
            assert (top / "report" / unquote(data["files"][file])).resolve() == run.metrics[name].file.resolve()
    assert sum(bool(row["collapsed"]) for row in data["runs"]) == 2


def test_texts_are_those_of_the_logs_and_shared_ones_are_there_once(swept):
    _, _, scripts, found = swept
    texts = json.loads(scripts["texts-of"])
    (one,) = texts["sets"]
    assert len(one["rows"]) == 4 * sweep.ROWS and one["rows"][0] == ["Forget", "0"]
    for run in found.runs:
        known, log = texts["of"][run.name], run.rows()
        assert known["tags"] == ["Question:", ""]
        asked, truth, after = (block(scripts, id) for id in (one["question"], one["truth"], known["after"]))
        for (name, key), *given in zip(one["rows"], asked, truth, after, strict=True):
            prompt, generation, right = log[f"{logs.TASKS[name]}.json"]["generated_text"][key]
            assert given == [prompt.removeprefix("Question: "), right, generation]
    unlearned = texts["of"]["forget10_npo_0.0001_seed2/eval_forget10"]
    assert unlearned["before_of"] == "full/eval_forget10" and unlearned["retain_of"] == "retain90/eval_forget10"
    assert unlearned["before"] == texts["of"]["full/eval_forget10"]["after"]
    assert len({known["retain"] for known in texts["of"].values() if "retain" in known}) == 1


def test_figures(swept):
    """Those of the report, each point a run of the page; one that is not drawn says why."""
    _, _, scripts, found = swept
    data = json.loads(scripts["data"])
    drawn = {figure["name"]: figure for figure in data["figures"]}
    assert {name for name, figure in drawn.items() if "why" in figure} == {"robustness"}
    ends = [trace for trace in drawn["tradeoff"]["data"] if trace["mode"] == "markers"]
    points = {
        number: (x, y) for one in ends for number, x, y in zip(one["customdata"], one["x"], one["y"], strict=True)
    }
    final = [run for run in found.final() if run.value("log10 Forget Quality") is not None]
    assert points == {
        found.runs.index(run): (run.value("Model Utility"), run.value("log10 Forget Quality")) for run in final
    }
    assert drawn["over_steps"]["choices"][:2] == ["Model Utility", "log10 Forget Quality"]
    assert len(drawn["utility"]["data"][0]["x"][0]) == 9


def test_only_its_own_scripts_may_run(swept):
    """The policy allows no network and the digests of the page's scripts alone; nothing refers to another host."""
    _, text, _, _ = swept
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1].replace("&#39;", "'")
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and "connect-src" not in policy
    assert "unsafe" not in policy.split("style-src")[0]
    allowed = set(re.findall(r"'sha256-([^']*)'", policy))
    codes = [body for kind, _, body in SCRIPT.findall(text) if not kind]
    made = {base64.b64encode(hashlib.sha256(code.encode()).digest()).decode() for code in codes}
    assert len(codes) == 3 and made < allowed and len(allowed) == 4, "three in the page, and Plotly's"
    markup = SCRIPT.sub("", re.sub(r"<style>.*?</style>", "", text, flags=re.DOTALL))
    assert not re.search(r"""(src|href|action)=["']?(https?:)?//""", markup)
    assert not re.search(r"\son\w+=", markup)


def test_the_same_runs_give_the_same_bytes(swept):
    top, text, _, _ = swept
    again, *_ = page_of(top / "report", top / "runs")
    assert again == text


def test_what_a_model_wrote_can_not_leave_its_place(tmp_path):
    """Names, reasons and texts with markup in them are data, wherever they stand."""
    log = sweep.log_of(0.5, 0.1, 1)
    log["eval_log_forget.json"]["generated_text"]["0"] = [f"Question: {HOSTILE}?", HOSTILE, HOSTILE]
    place = tmp_path / "runs" / "<img src=x onerror=alert(1)>"
    sweep.training(place, "forget10", 1e-5, 1, {}, "<b>npo</b>&")
    sweep.evaluation(place / "eval", log, None, "forget10", place, Collapse=["<script>window.pwned=1</script>"])
    sweep.write(tmp_path / "runs" / "z" / logs.AGGREGATED, log)
    sweep.write(tmp_path / "runs" / "<b>broken" / logs.AGGREGATED, {})
    text, scripts, found = page_of(tmp_path / "report", tmp_path / "runs")
    assert len(found.runs) == 2 and len(found.refused) == 1 and "1 result was not taken" in text
    outside = re.sub(r"<style>.*?</style>", "", SCRIPT.sub("", text), flags=re.DOTALL)
    assert "pwned" in outside and not re.search(r"<script|<img|<b>(npo|broken)", outside)
    assert not re.search(r"[<>&\u2028]", scripts["data"] + scripts["texts-of"])
    run = json.loads(scripts["data"])["runs"][0]
    assert run["keys"]["method"] == "<b>npo</b>&" and run["name"].startswith("<img src=x")
    assert block(scripts, json.loads(scripts["texts-of"])["of"][run["name"]]["after"])[0] == HOSTILE


def test_runs_without_texts_and_without_room_say_so(tmp_path, monkeypatch, caplog):
    """Without a log; with one without generations; and, last of all, checkpoints for which the page has no room."""
    bare = sweep.log_of(0.5, 0.1, 1)
    for one in bare.values():
        del one["generated_text"]
    sweep.write(tmp_path / "runs" / "bare" / logs.AGGREGATED, bare)
    (tmp_path / "runs" / "csv").mkdir()
    (tmp_path / "runs" / "csv" / "aggregate_stat.csv").write_text("Model Utility\n0.5\n")
    sweep.sweep(tmp_path / "runs", splits=("forget10",), methods=("npo",), rates=(1e-5,), seeds=(1, 2))
    text, scripts, found = page_of(tmp_path / "report", tmp_path / "runs")
    whole = json.loads(scripts["texts-of"])["of"]
    assert whole["bare"] == {"why": "its log holds no generations"}
    assert whole["csv"] == {"why": "there is no log of its rows"}
    assert sum("after" in one for one in whole.values()) == len(found.runs) - 2 and "left out</strong>" not in text
    left = [generations.collect(found, room).left_out for room in (*range(1000, 8000, 250), 10**6)]
    assert any(0 < len(one) < 5 and all("checkpoint-" in name for name in one) for one in left) and not left[-1]
    monkeypatch.setattr(site, "LIMIT", len(text.encode()) - 1)
    text, scripts, _ = page_of(tmp_path / "report", tmp_path / "runs")
    left = [name for name, one in json.loads(scripts["texts-of"])["of"].items() if "left out" in one.get("why", "")]
    runs = "1 run" if len(left) == 1 else f"{len(left)} runs"
    assert f"The generations of {runs} are left out</strong>" in text and f"{runs} are left out" in caplog.text
    assert len(text.encode()) <= site.LIMIT
    monkeypatch.setattr(site, "LIMIT", 10**6)
    with pytest.raises(utils.BadInput, match="format=html: index.html would have . MB even without generations"):
        page_of(tmp_path / "report", tmp_path / "runs")


@pytest.mark.parametrize(
    ("prompts", "questions", "tags"),
    [
        (
            [f"[INST] {a} is {a}? [/INST]" for a in "abcdefgh"],
            [f"{a} is {a}?" for a in "abcdefgh"],
            ["[INST]", "[/INST]"],
        ),
        (["Who is a?", "Who is b?"], ["Who is a?", "Who is b?"], ["", ""]),
        ([f"{i} who" for i in range(8)], [f"{i}" for i in range(8)], ["", "who"]),
        (["same"] * 8, ["same"] * 8, ["", ""]),
    ],
)
def test_tags_of_a_prompt(prompts, questions, tags):
    """What all prompts begin and end with is taken off, and told; of a few prompts nothing is."""
    assert generations.without_tags(prompts) == (questions, tags)
