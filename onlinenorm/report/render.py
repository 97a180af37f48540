"""Pages from templates/, and a report in a terminal."""

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from onlinenorm.report import benchmarks, clamp_words, page_words, words
from onlinenorm.report.ablation import Ablation, clamp_courses, clamp_removals
from onlinenorm.report.findings import Findings
from onlinenorm.report.paired import Pairing
from onlinenorm.report.predictions import epochs_without_clamp
from onlinenorm.report.removal import removal_courses, retrained
from onlinenorm.report.runs import Runs
from onlinenorm.report.settings import ReportSpec
from onlinenorm.report.tables import Report

_ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).with_name("templates")),
    autoescape=select_autoescape(("html.j2",), default_for_string=False),
    undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
)  # fmt: skip
_ENVIRONMENT.globals |= {"words": words, "clamp_words": clamp_words, "page_words": page_words, "retrained": retrained}


def render(template: str, **names: Any) -> str:
    """A page from one of templates/; names of folders that are no text are written with backslashes."""
    return _plain(_ENVIRONMENT.get_template(template).render(names))


def _plain(page: str) -> str:
    return page.encode(errors="backslashreplace").decode()


def fill(template: str, found: Findings) -> str:
    """A page that a person wrote, with the figures of `found` in their places."""
    figures = {name: getattr(found, name) for name in dir(found) if not name.startswith("_")}
    return _plain(_ENVIRONMENT.from_string(template).render(figures))


def render_markdown(report: Report) -> str:
    """The whole report as Markdown, tables first."""
    return render("table1.md.j2", report=report)


def render_page(
    report: Report,
    pictures: Mapping[str, tuple[bytes, bytes]],
    runs: pd.DataFrame | None = None,
    links: Mapping[str, str] | None = None,
) -> str:
    """The whole report as one HTML page that needs nothing beside it.

    Args:
        report: what it tells.
        pictures: PNG of "curves" and "intervals", each for wide and for narrow screens; b"" for none.
        runs: those of the report; without them there is no table of runs.
        links: a run's name -> its folder, as an address from the page's.
    """
    texts = {name: tuple(base64.b64encode(png).decode() for png in both) for name, both in pictures.items()}
    rows = [] if runs is None else page_words.runs(report, runs, links or {})
    return render("page.html.j2", report=report, pictures=texts, runs=rows)


def render_ablation(ablation: Ablation) -> str:
    """The whole ablation as Markdown."""
    return render(
        "ablation.md.j2",
        ablation=ablation,
        table=words.ablation_table(ablation),
        left_out=[
            (point, line) for point in ablation.points.itertuples() for line in (*point.diverged, *point.attempts)
        ],
    )


def render_pooled(pooled: pd.DataFrame, spec: ReportSpec, scale_label: str) -> str:
    """The comparisons as Markdown, with how they were made."""
    return render("paired.md.j2", table=words.table(words.pooled_columns(spec), pooled), scale_label=scale_label)


def render_clamping(studies: Mapping[str, Runs], picture: str | None, ways: bool) -> str:
    """What clamps did as Markdown; `picture` is the file name of the figure, if there is one, `ways`: is ways.png?"""
    courses, epochs, removals = clamp_courses(studies), removal_courses(studies), clamp_removals(studies)
    finished = [run for study in studies.values() for run in study.runs.itertuples() if run.finished]
    without = [run for run in finished if run.results["clamping"] and epochs_without_clamp(run.config)]
    return render(
        "clamping.md.j2",
        courses=words.table(clamp_words.CLAMP_COURSES, courses) if len(courses) else "",
        removals=words.table(clamp_words.CLAMP_REMOVALS, removals),
        drawn=len(removals) > 0,
        without=len(without),
        epochs=words.table(clamp_words.REMOVAL_COURSES, epochs) if len(epochs) else "",
        picture=picture,
        ways=ways,
    )


def render_cost(results: Mapping[str, Any], spec: ReportSpec) -> str:
    """The cost of error compensation as Markdown."""
    rows = benchmarks.costs(benchmarks.steps(results))
    return render(
        "cost.md.j2",
        device=results["device"],
        table=words.table(words.cost_columns(spec), rows),
        sentences=words.cost_sentences(results),
        origin=words.origin(results),
    )


def imagenet_table(results: Mapping[str, Any], trained: Mapping[str, tuple[float, int]], spec: ReportSpec) -> str:
    """The published rows with their commands and the GPU hours that measured rates make expect.

    `trained` maps a normalizer to (images/s, batch) of a whole training run of the same network and image size.
    """
    rates = benchmarks.imagenet(benchmarks.steps(results), list(spec.rows))
    batches = list(rates.columns[2:])

    def hours(rate: float) -> str:
        return f"{benchmarks.hours(rate):.1f} h ({rate:,.0f} images/s)"

    body = []
    for _, row in rates.iterrows():
        name = row["normalizer"]
        command = f"python train.py experiment=table1 normalizer={name} data.root=IMAGENET"
        command += " model.compile=false" * ("compile" not in row["mode"])  # both are on by default
        command += " trainer.cuda_graph=false" * ("graph" not in row["mode"])
        line = [spec.rows[name].label, f"`{command}`"]
        line += ["not measured" if pd.isna(row[batch]) else hours(row[batch]) for batch in batches]
        if trained:
            line.append(f"{hours(trained[name][0])}, batch {trained[name][1]}" if name in trained else "not run here")
        body.append([*line, "not run here"])
    head = ["ImageNet, 100 epochs", "command", *(f"GPU hours by steps of {batch}" for batch in batches)]
    head += ["GPU hours by the training run at 224 px"] * bool(trained)
    return words.markdown_table([*head, "best val accuracy, best val loss"], body)


def render_imagenet(results: Mapping[str, Any], trained: Mapping[str, tuple[float, int]], spec: ReportSpec) -> str:
    """What the table's own runs would take, and what to look for in their first epochs."""
    steps = benchmarks.steps(results)
    return render(
        "imagenet.md.j2",
        table=imagenet_table(results, trained, spec),
        device=results["device"],
        millions=benchmarks.EPOCHS * benchmarks.IMAGENET_IMAGES / 1e6,
        whole=all(benchmarks.as_trained(steps, name)["optimizer"].all() for name in spec.rows),
        trained=bool(trained),
    )


def print_report(report: Report, console: Console) -> None:
    """Prints the table, the clamp removal and the verdicts."""
    shown = Table(title=escape(report.heading), title_justify="left", title_style="bold", show_lines=True)
    shown.add_column("Normalizer\n(error compensation)")
    shown.add_column("n")
    for name in ("best val loss", "best val accuracy"):
        shown.add_column(escape(f"{name}\npublished:\n{report.published_short}"), style="dim")
        shown.add_column(escape(f"{name}\nhere:\n{report.scale_short}"))
    shown.add_column("last epoch\nval loss\nval accuracy")
    for label, *before, loss, top1 in words.cells(words.main_columns(report), report.rows):
        last = dict.fromkeys(cell.split("<br>")[0] for cell in (loss, top1))
        shown.add_row(*(escape(cell.replace("<br>", "\n")) for cell in (label, *before, "\n".join(last))))
    console.print(shown)
    console.print("[bold]Clamping removed before the final validation[/bold]")
    for removal in report.removals.itertuples():
        told = removal.sentence
        if removal.figures:
            cell = {name: show(removal) for name, show in clamp_words.REMOVALS.items()}
            told = (
                f"with clamp {cell['val accuracy with']} (loss {cell['val loss with']}), "
                f"without {cell['val accuracy without']} (loss {cell['val loss without']}); {told}; "
                f"clamped fraction {cell['clamped fraction']}, largest |activation| {cell['largest |activation|']}"
            )
        console.print(f"  {escape(removal.run or removal.label)}: {escape(told)}", highlight=False)
    console.print("[bold]Verdicts[/bold]")
    shared = words.shared_verdict(report)
    if shared:
        console.print(f"  against published: {escape(shared)}", highlight=False)
    for published in (False,) if shared else (True, False):
        for name, group in words.comparison_groups(report, published).items():
            if len({words.verdict_text(c) for c in group}) == 1 and not any(c.verdict.difference for c in group):
                console.print(f"  {escape(name)}: {escape(words.verdict_text(group[0]))}", highlight=False)
                continue
            for comparison in group:
                said = f"{name}, {words.METRIC_NAMES[comparison.metric]}: {words.verdict_text(comparison)}"
                detail = words.verdict_detail(comparison)
                console.print(f"  {escape(said + f': {detail}' * bool(detail))}", highlight=False)


def render_pairing(pairing: Pairing, name_a: str, name_b: str) -> str:
    """The comparison in words and a table (Markdown)."""
    return render("pairing.md.j2", p=pairing, name_a=name_a, name_b=name_b)
