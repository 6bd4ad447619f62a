"""Bad input of every kind: one line, exit code 2, no traceback, no folder; docs/refusals.md shows them.

WRITE=1 python -m pytest -n0 tests/test_refusals.py writes the page anew.
"""

import contextlib
import importlib
import io
import os
import re
import sys

import pytest
import refusals
from helpers import REPO

PAGE = REPO / "docs" / "refusals.md"
CASES = [case for cases in refusals.TITLES.values() for case in cases]
HEAD = """# What is refused

Every bad input ends in one line on stderr and exit code 2, before a model is loaded where it can be known by then. No
folder is left behind. `tests/test_refusals.py` writes this page: it runs each line beside settings that are good.
"""
LISTS = re.compile(r"(: it may be |one of |there are |it has |: forget.py takes |: take another method).*")


@pytest.fixture(scope="module")
def refuse(tmp_path_factory, model_folder):
    """Run one case in this process; what it said in one line, once however often it is asked."""
    work, known = tmp_path_factory.mktemp("bad"), {}
    refusals.make(work, model_folder)

    def run(case) -> str:
        if case not in known:
            known[case] = one(work, *case[:2])
        return known[case]

    return run


def one(work, script: str, words: str) -> str:
    own = words.split()
    given = {word.lstrip("+").split("=")[0] for word in own}
    base = [f"{key}={value}" for key, value in refusals.BASE[script].items() if key not in given]
    before, argv, err, here = set(work.iterdir()), sys.argv, io.StringIO(), os.getcwd()
    sys.argv = [script, *base, *own]
    os.chdir(work)
    try:
        with (
            contextlib.redirect_stderr(err),
            contextlib.redirect_stdout(io.StringIO()),
            pytest.raises(SystemExit) as end,
        ):
            importlib.import_module(script.removesuffix(".py").replace("/", ".")).main()
    finally:
        sys.argv = argv
        os.chdir(here)
    said = err.getvalue()
    assert end.value.code == 2, said
    (line,) = [line for line in re.split(r"[\r\n]", said) if line.startswith("error: ")]
    assert "Traceback" not in said
    left = [str(path.relative_to(work)) for path in set(work.iterdir()) - before]
    assert not left, [*left, *(path.name for one in left for path in (work / one).iterdir())]
    return line.removeprefix("error: ").replace(f"{work}/", "").replace(str(work), ".")


@pytest.mark.parametrize("case", CASES, ids=[f"{script} {words}" for script, words, _ in CASES])
def test_refused(refuse, case):
    assert case[2] in refuse(case)


def test_the_page(refuse):
    lines = [HEAD]
    for title, cases in refusals.TITLES.items():
        lines += [f"## {title}", "", "| command | what it says |", "| --- | --- |"]
        for script, words, *rest in cases:
            said = LISTS.sub(r"\1...", refuse((script, words, *rest)))[:220].replace("|", "\\|").replace("<", "&lt;")
            lines.append(f"| `{script} {words}` | {said} |")
        lines.append("")
    text = "\n".join(lines)
    if os.environ.get("WRITE"):
        PAGE.write_text(text)
    assert len(CASES) >= 60 and PAGE.read_text() == text
