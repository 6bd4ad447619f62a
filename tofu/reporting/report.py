"""A whole report out of result folders: runs.csv, tables, figures, and the list of what is in it and what is not."""

import importlib.util
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import utils
from tofu.reporting import folder, grouping, leaderboard, results
from tofu.reporting.grouping import Group
from tofu.reporting.runs import Collected

log = logging.getLogger(__name__)

NEEDED = ("matplotlib", "pandas", "jinja2", "itables", "plotly")  # the extra `report`
RUNS, INDEX, TABLES, FIGURES = "runs.csv", "report.md", "tables", "figures"
WRITTEN, SITE = ("csv", "md", "tex"), "html"  # formats of tables, and of the page; the others are those of figures


def require() -> None:
    """Raise BadInput where a package of the extra `report` is missing."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise utils.BadInput(
            f"report.py needs {', '.join(NEEDED)}, and {', '.join(missing)} is not installed: "
            "pip install -e '.[report]' installs them"
        )


def write(cfg: Mapping[str, Any]) -> Collected:
    """Read the results, write the report into `save_dir`, say what is there.

    Args:
        cfg: a checked `schema.Report`.

    Returns:
        What was read.

    Raises:
        BadInput: no run in any of `results`; a key or a metric that none has; `save_dir` holds other files.
    """
    require()
    folder.check(cfg["save_dir"])
    found = results.collect(cfg["results"], cfg["retain_result"], cfg["start_result"], cfg["truth_ratio"])
    for one in found.refused:
        log.warning("not taken: %s: %s", one.place, one.why)
    if not found.runs:
        why = f": {found.refused[0].place}: {found.refused[0].why}" if found.refused else ""
        raise utils.BadInput(f"results={','.join(cfg['results'])} has no run that can be read{why}")
    keys = grouping.grouping(found.final(), cfg["group_by"])
    metrics = grouping.metrics_of(found.runs, cfg["metrics"])
    lines = {name: grouping.measured(grouping.groups(found.final(), keys, of)) for name, of in metrics.items()}
    _check_baseline(cfg["baseline"], lines)
    submitted, broken = leaderboard.submissions(found.final())
    found.refused += broken
    with folder.whole(cfg["save_dir"]) as out:
        utils.write_text(out / "leaderboard.csv", leaderboard.to_csv(found.final(), submitted))
        if submitted:
            utils.write_text(out / "LEADERBOARD.md", leaderboard.page(found.final(), submitted))
        written = _tables(out, cfg, found, metrics, lines)
        drawn = _figures(out, cfg, found)
        utils.write_text(out / INDEX, _index(cfg, found, metrics, lines, written, drawn))
        if SITE in cfg["format"]:
            from tofu.reporting import site

            site.write(out, cfg, found, metrics)
    start = Path(cfg["save_dir"]) / ("index.html" if SITE in cfg["format"] else INDEX)
    log.info("%d runs, %d results not taken: %s", len(found.runs), len(found.refused), start)
    return found


def _check_baseline(baseline: str | None, lines: Mapping[str, list[Group]]) -> None:
    if baseline is not None:
        utils.choice("baseline", baseline, dict.fromkeys(group.method for of in lines.values() for group in of))


def _tables(
    out: Path,
    cfg: Mapping[str, Any],
    found: Collected,
    metrics: Mapping[str, list[str]],
    lines: Mapping[str, list[Group]],
) -> list[str]:
    """Write runs.csv and every table in its formats. Returns the files' names."""
    from tofu.reporting import latex, tables

    utils.write_text(out / RUNS, tables.frame(found.runs, cfg["intervals"]).to_csv(index=False, lineterminator="\n"))
    contents: dict[str, str] = {}
    for name, of in metrics.items():
        asked = {name: lines[name]}
        if cfg["baseline"] is not None:
            asked[f"{name}_minus_{cfg['baseline']}".replace(" ", "_")] = tables.differences(
                lines[name], cfg["baseline"], of
            )
        for title, groups in asked.items():
            if groups:
                contents[f"{title}.csv"] = tables.to_csv(groups, of)
                contents[f"{title}.md"] = tables.to_markdown(groups, of, cfg["intervals"])
                contents[f"{title}.tex"] = latex.to_latex(
                    groups, of, cfg["intervals"], latex.caption(title, cfg["group_by"] is not None), f"tab:{title}"
                )
    kept = {name: text for name, text in contents.items() if name.rpartition(".")[2] in cfg["format"]}
    for name, text in kept.items():
        utils.write_text(out / TABLES / name, text)
    return list(kept)


def _figures(out: Path, cfg: Mapping[str, Any], found: Collected) -> Mapping[str, Any]:
    """Draw every figure that the runs allow: name -> its title, or why it is not there."""
    formats = [one for one in cfg["format"] if one not in (*WRITTEN, SITE)]
    if not formats:
        return {}
    from tofu.reporting import figures

    return figures.draw(found, out / FIGURES, formats)


def _index(
    cfg: Mapping[str, Any],
    found: Collected,
    metrics: Mapping[str, list[str]],
    lines: Mapping[str, list[Group]],
    written: list[str],
    drawn: Mapping[str, Any],
) -> str:
    """The page in Markdown: the tables, the figures, what was left out and what was not taken."""
    from tofu.reporting import tables

    text = [
        "# Report",
        "",
        f"{len(found.runs)} evaluations, all in [{RUNS}]({RUNS}); [leaderboard.csv](leaderboard.csv)"
        + ("; [index.html](index.html) to sort, filter and read generations." if SITE in cfg["format"] else "."),
        "",
        tables.note(cfg["group_by"] is not None),
        "",
    ]
    for name, of in metrics.items():
        text += [f"## {tables.TITLES.get(name, name)}", "", tables.to_markdown(lines[name], of, cfg["intervals"])]
    text += ["Files: " + ", ".join(f"[{name}]({TABLES}/{name})" for name in written), ""] if written else []
    if drawn:
        best = "A method's best setting is the one with the largest model utility x forget quality, mean over seeds."
        text += ["## Figures", "", best, ""]
        for one in drawn.values():
            files = ", ".join(f"[{file.rpartition('.')[2]}]({FIGURES}/{file})" for file in one.files)
            text.append(f"- {one.title}: {files or f'not drawn, {one.why}'}")
        text.append("")
        text += [f"![{one.title}]({FIGURES}/{file})\n" for one in drawn.values() for file in one.files[:1]]
    collapsed = [run for run in found.runs if run.collapsed]
    for title, said in (
        ("Collapsed models", [f"`{run.name}`: {'; '.join(run.collapsed)}" for run in collapsed]),
        ("Left out", [f"`{run.name}`: {one}" for run in found.runs for one in run.said]),
        ("Not taken", [f"`{one.place}`: {one.why}" for one in found.refused]),
    ):
        text += [f"## {title}", "", *(f"- {one}" for one in said), ""] if said else []
    return "\n".join(text)
