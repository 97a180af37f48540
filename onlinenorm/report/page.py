"""`Report` as one HTML file that needs nothing beside it: styles and the picture are inside, and it prints."""

import base64
from collections.abc import Sequence
from html import escape

from onlinenorm.report import text
from onlinenorm.report.table import COMPARED_METRICS, Comparison, Report
from onlinenorm.report.text import Cell

_CSS = """
:root { --ink: #1d2430; --soft: #5b6675; --line: #dfe3e8; --tint: #f6f7f9; --warn: #8a4b00; --good: #00684a; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink); font: 16px/1.5 system-ui, Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 8px; }
h2 { font-size: 20px; margin: 40px 0 10px; padding-top: 16px; border-top: 1px solid var(--line); }
p { margin: 0 0 12px; max-width: 80ch; }
.badge { display: inline-block; padding: 4px 12px; border-radius: 6px; font-size: 15px; font-weight: 600; }
.badge { margin: 0 0 20px; }
.badge.full { background: #e2f3ec; color: var(--good); }
.badge.small { background: #fff0d9; color: var(--warn); }
.scroll { overflow-x: auto; margin: 0 0 20px; }
table { border-collapse: collapse; width: 100%; font-size: 15px; font-variant-numeric: tabular-nums; }
th, td { padding: 8px 10px; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
th, td { overflow-wrap: break-word; }
thead th { background: var(--tint); font-size: 13px; line-height: 1.3; vertical-align: bottom; }
thead th.group { text-align: center; border-left: 2px solid #fff; }
tbody th { font-weight: 600; }
.swatch { display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin-right: 8px; }
.detail { display: block; color: var(--soft); font-size: 13px; line-height: 1.35; }
.published { color: var(--soft); }
.outcome { font-weight: 600; }
.outcome.equivalent { color: var(--good); }
.outcome.different { color: #a3223a; } .outcome.other { color: var(--warn); }
.note { color: var(--soft); font-size: 14px; }
img { width: 100%; height: auto; display: block; }
.facts { display: grid; grid-template-columns: 110px 1fr; gap: 2px 12px; margin: 0 0 16px; font-size: 15px; }
.facts dt { color: var(--soft); } .facts dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 760px) {
  main { padding: 20px 16px 40px; }
  h1 { font-size: 24px; }
  table.cards thead { display: none; }
  table.cards, table.cards tbody, table.cards tr, table.cards th, table.cards td { display: block; width: 100%; }
  table.cards tr { border: 1px solid var(--line); border-radius: 8px; padding: 8px 12px; margin: 0 0 12px; }
  table.cards th, table.cards td { border: 0; padding: 3px 0; }
  table.cards td { display: grid; grid-template-columns: 45% 1fr; gap: 10px; white-space: normal; }
  table.cards td::before { content: attr(data-label); color: var(--soft); font-size: 14px; }
}
@media print {
  @page { size: A4 landscape; margin: 12mm; }
  body { font-size: 11pt; } main { max-width: none; padding: 0; }
  .scroll { overflow: visible; } h2 { break-after: avoid; } table, img { break-inside: avoid; }
  .badge, thead th, .swatch { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""


def render_page(report: Report, curves_png: bytes, narrow_png: bytes) -> str:
    """The whole report as one self-contained HTML page; `narrow_png` shows the curves on narrow screens."""
    badge = "full" if report.scale == "imagenet" else "small"
    body = [
        f"<h1>{escape(report.title)}: published against reproduced</h1>",
        f'<div class="badge {badge}">{escape(report.scale_label)}</div>',
        _main_table(report),
        '<p class="note">Losses in nats on the validation set. Best loss and best accuracy are '
        "picked over epochs independently. "
        "n counts finished seeds; with more than one, mean ± sample standard deviation.</p>",
        "<h2>Training curves</h2>",
        f'<picture><source media="(max-width: 760px)" srcset="{_inline(narrow_png)}">'
        f'<img alt="Loss and accuracy against epoch, {escape(report.scale_label)}" '
        f'src="{_inline(curves_png)}"></picture>',
        "<h2>Verdicts</h2>",
        f"<p>{escape(report.rule)}</p>",
        _verdicts(report),
        "<h2>Clamping removed before the final validation</h2>",
        _removals(report),
        *_recounts(report),
        "<h2>Departures from the published setting</h2>",
        _departures(report),
        "<h2>Where the numbers come from</h2>",
        _sources(report),
        _provenance(report),
    ]
    title = escape(report.heading)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )


def _inline(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"


def _cell(cell: Cell, label: str, style: str = "") -> str:
    detail = f'<span class="detail">{escape(cell.detail).replace("; ", "<br>")}</span>' if cell.detail else ""
    kind = f' class="{style}"' if style else ""
    return f'<td data-label="{escape(label)}"{kind}><span>{escape(cell.main)}{detail}</span></td>'


def _main_table(report: Report) -> str:
    here = report.scale_short
    groups = "".join(
        f'<th class="group" colspan="2">{name}</th>' for name in ("Best val loss", "Best val accuracy", "Last epoch")
    )
    columns = ["published: ImageNet", f"here: {here}"] * 2 + [f"val loss, here: {here}", f"val accuracy, here: {here}"]
    head = '<tr><th rowspan="2">Normalizer (error compensation)</th><th rowspan="2">n</th>' + groups + "</tr><tr>"
    head += "".join(f"<th>{escape(column)}</th>" for column in columns) + "</tr>"
    lines = []
    for row in report.rows:
        swatch = f'<span class="swatch" style="background:{escape(row.colour)}"></span>'
        cells = [f'<th scope="row">{swatch}{escape(row.label)}</th>', _cell(text.seeds_cell(row), "n")]
        for metric in ("best_loss", "best_top1"):
            name = text.METRIC_NAMES[metric]
            cells.append(_cell(text.published_cell(row, metric), f"{name}, published: ImageNet", "published"))
            cells.append(_cell(text.reproduced_cell(row, metric, report.confidence), f"{name}, here: {here}"))
        for metric in ("last_loss", "last_top1"):
            cells.append(
                _cell(
                    text.reproduced_cell(row, metric, report.confidence), f"{text.METRIC_NAMES[metric]}, here: {here}"
                )
            )
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return _frame(head, lines)


def _frame(head: str, lines: Sequence[str]) -> str:
    return (
        f'<div class="scroll"><table class="cards"><thead>{head}</thead><tbody>{"".join(lines)}</tbody></table></div>'
    )


def _simple(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of already plain cells, the first of each line as its head."""
    lines = []
    for first, *rest in rows:
        cells = "".join(_cell(Cell(cell), label) for cell, label in zip(rest, head[1:], strict=True))
        lines.append(f'<tr><th scope="row">{escape(first)}</th>{cells}</tr>')
    return _frame(f"<tr>{''.join(f'<th>{escape(name)}</th>' for name in head)}</tr>", lines)


def _verdicts(report: Report) -> str:
    parts = []
    for published, title in ((True, "against published"), (False, "between these runs")):
        if published and (shared := text.shared_verdict(report)):
            parts.append(f'<p>Against the published values: <span class="outcome other">{escape(shared)}</span>.</p>')
            continue
        head = [title, *(text.METRIC_NAMES[metric] for metric in COMPARED_METRICS)]
        lines = []
        for name, group in text.comparison_groups(report, published).items():
            cells = "".join(_verdict(comparison, label) for comparison, label in zip(group, head[1:], strict=True))
            lines.append(f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>')
        parts.append(_frame(f"<tr>{''.join(f'<th>{name}</th>' for name in head)}</tr>", lines))
    return "\n".join(parts)


def _verdict(comparison: Comparison, label: str) -> str:
    outcome = comparison.verdict.outcome
    style = outcome if outcome in ("equivalent", "different") else "other"
    verdict = f'<span class="outcome {style}">{escape(text.verdict_text(comparison))}</span>'
    detail = f'<span class="detail">{escape(text.verdict_detail(comparison))}</span>'
    return f'<td data-label="{escape(label)}"><span>{verdict}{detail}</span></td>'


def _removals(report: Report) -> str:
    measured = [removal for removal in report.removals if removal.figures]
    table = _simple(text.REMOVAL_HEAD, [text.removal_cells(removal) for removal in measured]) if measured else ""
    items = "".join(f"<li><b>{escape(r.run or r.label)}</b>: {escape(r.sentence)}</li>" for r in report.removals)
    return f"{table}<ul>{items}</ul>"


def _recounts(report: Report) -> list[str]:
    if not report.recounts:
        return []
    rows = [text.recount_cells(found) for found in report.recounts]
    note = f"<p>{escape(text.RECOUNT_NOTE)}</p>"
    return ["<h2>Accuracies by one rule</h2>", note, _simple(text.RECOUNT_HEAD, rows)]


def _departures(report: Report) -> str:
    if not report.departures:
        return "<p>None.</p>"
    rows = [text.departure_cells(departure, report) for departure in report.departures]
    return _simple(["setting", "published", "here"], rows)


def _sources(report: Report) -> str:
    items = []
    for row in (row for row in report.rows if row.published):
        epochs = f", {row.published.epochs}" if row.published.epochs else ""
        items.append(
            f"<li>{escape(row.label)}, published: {escape(row.published.source)} (one run{escape(epochs)})</li>"
        )
    return f"<ul>{''.join(items)}</ul>"


def _provenance(report: Report) -> str:
    blocks = []
    for runs, environment in text.environments(report.provenance):
        entries = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in environment.items())
        blocks.append(f'<dl class="facts"><dt>runs</dt><dd>{escape(", ".join(runs))}</dd>{entries}</dl>')
    rows = [text.run_cells(run) for run in report.provenance]
    return "".join(blocks) + _simple(text.RUN_HEAD, rows)
