"""The report as one web page that needs no network: the table of runs, the figures, a browser of their generations."""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import importlib.resources
import json
import logging
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import utils
from tofu.reporting import generations, grouping, interactive, tables
from tofu.reporting.canvas import QUALITY, UTILITY
from tofu.reporting.runs import Collected, Run

log = logging.getLogger(__name__)

OWN = ("page.js", "table.js", "generations.js", "figures.js", "keys.js")  # one script, in this order
PAGE, LIMIT = "index.html", 60_000_000  # bytes
FEW = 40  # different values of a key from which on its filter is no list to choose from


def write(out: Path, cfg: Mapping[str, Any], found: Collected, metrics: Mapping[str, Sequence[str]]) -> None:
    """Write index.html, at most `LIMIT` bytes: what has no room is left out, and page and log say so.

    Args:
        out: the folder.
        cfg: `schema.Report`; links go from its `save_dir` to the files of the results.
        metrics: table -> its metrics, of `grouping.metrics_of`.

    Raises:
        BadInput: it would be larger without any generation.
    """
    data, libraries = to_json(_data(found, metrics, Path(cfg["save_dir"]))), _libraries()
    empty = len(_filled(found, data, libraries, generations.Shown()).encode())
    texts = generations.collect(found, LIMIT - empty)
    if texts.left_out:
        runs = "1 run" if len(texts.left_out) == 1 else f"{len(texts.left_out)} runs"
        log.warning("%s: the generations of %s are left out, %d MB is its limit", PAGE, runs, LIMIT // 10**6)
    page = _filled(found, data, libraries, texts)
    if (size := len(page.encode())) > LIMIT:
        raise utils.BadInput(
            f"format=html: {PAGE} would have {size // 10**6} MB even without generations, it may have "
            f"{LIMIT // 10**6}: name fewer results, or leave html out of format"
        )
    utils.write_text(out / PAGE, page)


def _data(found: Collected, metrics: Mapping[str, Sequence[str]], save_dir: Path) -> dict[str, Any]:
    """Columns, rows and figures, as page.js reads them."""
    main = list(metrics.get("main", ()))
    keys, shown = _keys(found), set(grouping.grouping(found.final()))
    names = list(dict.fromkeys(name for of in metrics.values() for name in of))
    names += list(dict.fromkeys(name for run in found.runs for name in run.metrics if name not in names))
    columns: list[dict[str, Any]] = [
        {"name": "run", "kind": "run", "shown": True},
        {"name": "state", "kind": "text", "shown": any(run.collapsed for run in found.runs), "few": True},
    ]
    for name in keys:
        few = len({str(grouping.key_of(run, name)) for run in found.runs}) <= FEW
        columns.append({"name": name, "kind": "key", "shown": name in shown or name == grouping.METHOD, "few": few})
    columns.append({"name": "step", "kind": "number", "shown": any(run.checkpoint for run in found.runs)})
    columns.append(
        {"name": "evaluated", "kind": "text", "shown": any(run.checkpoint for run in found.runs), "few": True}
    )
    for name in names:
        columns.append({"name": name, "kind": "metric", "title": tables.header(name), "shown": name in main})
    files = _Files(save_dir)
    choices = list(dict.fromkeys((UTILITY, QUALITY, *main)))
    return {
        "columns": columns,
        "sets": {tables.TITLES.get(name, name): list(of) for name, of in metrics.items()},
        "keys": [name for name in keys if name in shown or name == grouping.METHOD],
        "runs": [_row(run, keys, names, files) for run in found.runs],
        "files": files.links,
        "figures": interactive.draw(found, choices),
    }


def _keys(found: Collected) -> list[str]:
    """The keys that are columns: all that vary, and the method."""
    varying = [name for name in grouping.varying(found.runs) if name != grouping.METHOD]
    return [grouping.METHOD, *varying]


class _Files:
    """Links from the report's folder to files, each once."""

    def __init__(self, save_dir: Path) -> None:
        self.start = save_dir.resolve()
        self.links: list[str] = []
        self.known: dict[Path, int] = {}

    def number(self, file: Path) -> int:
        """A file's place in `links`."""
        if file not in self.known:
            self.known[file] = len(self.links)
            self.links.append(quote(os.path.relpath(file.resolve(), self.start)))
        return self.known[file]


def _row(run: Run, keys: Sequence[str], names: Sequence[str], files: _Files) -> dict[str, Any]:
    """A run: keys by column, numbers as [value, file, note], its files and what is to be said of it."""
    numbers = {}
    for name in names:
        if name in run.metrics:
            one = run.metrics[name]
            note = [one.reason or ""] if one.value is None else []
            note += [f"n = {one.n}"] if one.n is not None else []
            note += [f"95 % interval {' to '.join(map(tables.number, one.interval))}"] if one.interval else []
            numbers[name] = [one.value, files.number(one.file), "; ".join(note)]
    linked = {"log": run.log, "retain model's log": run.retain, "starting model's log": run.start}
    return {
        "name": run.name,
        "keys": {name: grouping.key_of(run, name) for name in keys},
        "step": run.step,
        "checkpoint": run.checkpoint,
        "collapsed": run.collapsed,
        "said": run.said,
        "numbers": numbers,
        "files": {name: files.number(file) for name, file in linked.items() if file is not None},
    }


def _libraries() -> dict[str, str]:
    """The JavaScript and CSS of the packages that the page bundles, and their versions."""
    import itables
    import plotly.offline

    folder, plotly_js = Path(itables.__file__).parent / "html", plotly.offline.get_plotlyjs()
    module = (folder / "dt_bundle.js").read_text(encoding="utf-8")
    exported = re.search(r"export\s*\{[^}]*?([\w$]+) as jQuery[^}]*\};?", module)
    if exported is None:
        raise utils.BadInput(
            f"format=html: itables {itables.__version__} bundles DataTables in a form that is not known: "
            "pip install -e '.[report]' installs the one that is"
        )
    module = f"{module[: exported.start()]}window.jQuery={exported[1]};{module[exported.end() :]}"
    return {
        "datatables": f'(()=>{{"use strict";{module}}})();',
        "datatables_css": (folder / "dt_bundle.css").read_text(encoding="utf-8"),
        "plotly": plotly_js,
        "plotly_block": generations.pack(plotly_js),
        "itables_version": importlib.metadata.version("itables"),
        "plotly_version": importlib.metadata.version("plotly"),
    }


def _filled(found: Collected, data: str, libraries: Mapping[str, str], texts: generations.Shown) -> str:
    """The page's text."""
    import jinja2
    from markupsafe import Markup

    folder = importlib.resources.files("tofu.reporting") / "templates"
    own = {name: (folder / name).read_text(encoding="utf-8") for name in (*OWN, "theme.js", "page.css")}
    parts = "\n".join(own[name] for name in OWN)
    scripts = {"theme": own["theme.js"], "datatables": libraries["datatables"]}
    scripts["page"] = f'(() => {{\n"use strict";\n{parts}}})();\n'
    scripts = {name: _script(text) for name, text in scripts.items()}
    hashes = [_hash(text) for text in (*scripts.values(), libraries["plotly"])]
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string((folder / "index.html.j2").read_text(encoding="utf-8")).render(
        found=found,
        models=len({run.of for run in found.runs}),
        collapsed=[run for run in found.runs if run.collapsed],
        said=[(run.name, one) for run in found.runs for one in run.said],
        left_out=texts.left_out,
        limit=LIMIT // 10**6,
        policy=" ".join(f"'{one}'" for one in hashes),
        style=Markup(libraries["datatables_css"] + own["page.css"]),
        scripts={name: Markup(text) for name, text in scripts.items()},
        data=Markup(data),
        texts=Markup(to_json({"sets": texts.sets, "of": texts.of_run})),
        blocks=texts.blocks,
        libraries=libraries,
    )


def to_json(value: Any) -> str:
    """JSON that may stand in a script element: no end tag, no comment, no NaN (it is null)."""
    text = json.dumps(_finite(value), separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int | None) else str(value)


def _script(text: str) -> str:
    """JavaScript that may stand in a script element."""
    return re.sub(r"<(?=!--|/?script)", r"\\x3c", text, flags=re.IGNORECASE)


def _hash(text: str) -> str:
    """A script as the page's content security policy names it."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
