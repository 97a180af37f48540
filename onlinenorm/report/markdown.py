"""`Report` as Markdown: table1.md, and what the README's table is generated from."""

from collections.abc import Sequence

from onlinenorm.report import text
from onlinenorm.report.table import COMPARED_METRICS, Provenance, Report


def render_markdown(report: Report) -> str:
    """The whole report as Markdown, tables first."""
    parts = [f"# {report.heading}", main_table(report), *filter(None, [report.note]), "![Training curves](curves.png)"]
    parts += ["## Verdicts", *_verdicts(report)]
    parts += ["## Clamping removed before the final validation", *_removals(report)]
    if report.recounts:
        rows = [text.recount_cells(found) for found in report.recounts]
        parts += ["## Accuracies by one rule", text.RECOUNT_NOTE, markdown_table(text.RECOUNT_HEAD, rows)]
    parts += ["## Departures from the published setting", _departures(report)]
    parts += ["## Where the numbers come from", _sources(report), provenance_markdown(report.provenance)]
    return "\n\n".join(parts) + "\n"


def main_table(report: Report) -> str:
    """Published against reproduced, one line a normalizer."""
    here = f"here: {report.scale_short}"
    head = ["Normalizer (error compensation)", "n"]
    for metric in ("best_loss", "best_top1"):
        head += [f"{text.METRIC_NAMES[metric]}, published: ImageNet", f"{text.METRIC_NAMES[metric]}, {here}"]
    head += [f"{text.METRIC_NAMES[metric]}, {here}" for metric in ("last_loss", "last_top1")]
    body = []
    for row in report.rows:
        cells = [text.Cell(row.label), text.seeds_cell(row)]
        for metric in ("best_loss", "best_top1"):
            cells += [text.published_cell(row, metric), text.reproduced_cell(row, metric, report.confidence)]
        cells += [text.reproduced_cell(row, metric, report.confidence) for metric in ("last_loss", "last_top1")]
        body.append([cell.main + (f"<br>{cell.detail}" if cell.detail else "") for cell in cells])
    return markdown_table(head, body)


def markdown_table(head: Sequence[str], body: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _verdicts(report: Report) -> list[str]:
    parts = [report.rule]
    for published, title in ((True, "against published"), (False, "between these runs")):
        if published and (shared := text.shared_verdict(report)):
            parts.append(f"Against the published values: **{shared}**.")
            continue
        lines = []
        for name, group in text.comparison_groups(report, published).items():
            cells = [(f"**{text.verdict_text(c)}**", text.verdict_detail(c)) for c in group]
            lines.append([name, *(verdict + (f"<br>{detail}" if detail else "") for verdict, detail in cells)])
        parts.append(markdown_table([title, *(text.METRIC_NAMES[metric] for metric in COMPARED_METRICS)], lines))
    return parts


def _removals(report: Report) -> list[str]:
    measured = [removal for removal in report.removals if removal.figures]
    parts = (
        [markdown_table(text.REMOVAL_HEAD, [text.removal_cells(removal) for removal in measured])] if measured else []
    )
    return [*parts, "\n".join(f"- {r.run or r.label}: {r.sentence}" for r in report.removals)]


def _departures(report: Report) -> str:
    if not report.departures:
        return "None."
    rows = [text.departure_cells(departure, report) for departure in report.departures]
    return markdown_table(["setting", "published", "here"], rows)


def _sources(report: Report) -> str:
    lines = []
    for row in (row for row in report.rows if row.published):
        epochs = f", {row.published.epochs}" if row.published.epochs else ""
        lines.append(f"- {row.label}, published: {row.published.source} (one run{epochs})")
    return "\n".join(lines)


def provenance_markdown(provenance: Sequence[Provenance]) -> str:
    """Commit, versions and hardware of runs, and a line a run with its command."""
    lines = []
    for runs, environment in text.environments(provenance):
        lines.append(f"- {', '.join(runs)}: " + "; ".join(f"{name}: {value}" for name, value in environment.items()))
    body = [[*cells[:-1], f"`{cells[-1]}`"] for cells in map(text.run_cells, provenance)]
    return "\n".join(lines) + "\n\n" + markdown_table(text.RUN_HEAD, body)
