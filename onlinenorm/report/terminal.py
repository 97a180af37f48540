"""`Report` in a terminal."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from onlinenorm.report import text
from onlinenorm.report.table import Report


def print_report(report: Report, console: Console) -> None:
    """Prints the table, the clamp removal and the verdicts."""
    table = Table(title=escape(report.heading), title_justify="left", title_style="bold", show_lines=True)
    table.add_column("Normalizer\n(error compensation)")
    table.add_column("n")
    for name in ("best val loss", "best val accuracy"):
        table.add_column(f"{name}\npublished:\nImageNet", style="dim")
        table.add_column(escape(f"{name}\nhere:\n{report.scale_short}"))
    table.add_column("last epoch\nval loss\nval accuracy")
    for row in report.rows:
        cells = [text.Cell(row.label), text.seeds_cell(row)]
        for metric in ("best_loss", "best_top1"):
            cells += [text.published_cell(row, metric), text.reproduced_cell(row, metric, report.confidence)]
        loss, top1 = (text.reproduced_cell(row, metric).main for metric in ("last_loss", "last_top1"))
        cells.append(text.Cell(loss if loss == top1 else f"{loss}\n{top1}"))
        table.add_row(*(escape(cell.main + (f"\n{cell.detail}" if cell.detail else "")) for cell in cells))
    console.print(table)
    console.print("[bold]Clamping removed before the final validation[/bold]")
    for removal in report.removals:
        console.print(f"  {escape(removal.run or removal.label)}: {escape(_removal(removal))}", highlight=False)
    console.print("[bold]Verdicts[/bold]")
    shared = text.shared_verdict(report)
    if shared:
        console.print(f"  against published: {escape(shared)}", highlight=False)
    for published in (False,) if shared else (True, False):
        for name, group in text.comparison_groups(report, published).items():
            if len({text.verdict_text(c) for c in group}) == 1 and not any(c.verdict.difference for c in group):
                console.print(f"  {escape(name)}: {escape(text.verdict_text(group[0]))}", highlight=False)
                continue
            for comparison in group:
                detail = text.verdict_detail(comparison)
                line = f"{name}, {text.METRIC_NAMES[comparison.metric]}: {text.verdict_text(comparison)}"
                console.print(f"  {escape(line)}" + (f": {escape(detail)}" if detail else ""), highlight=False)


def _removal(removal) -> str:
    if not removal.figures:
        return removal.sentence
    cells = dict(zip(text.REMOVAL_HEAD, text.removal_cells(removal), strict=True))
    return (
        f"with clamp {cells['val accuracy with']} (loss {cells['val loss with']}), "
        f"without {cells['val accuracy without']} (loss {cells['val loss without']}); {removal.sentence}; "
        f"clamped fraction {cells['clamped fraction']}, largest |activation| {cells['largest |activation|']}"
    )
