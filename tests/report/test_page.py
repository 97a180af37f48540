"""The HTML page: what it says first, its figure of intervals, its runs, and that it needs nothing beside it."""

import html
import re

import pytest
from run_folders import write_run

from onlinenorm.report import page_words
from onlinenorm.report.build import table_files
from onlinenorm.report.figures import draw_intervals
from onlinenorm.report.runs import load_runs
from onlinenorm.report.tables import build_report

PNG = b"\x89PNG"


def made(folder, spec, page=None):
    """(report, page) of the runs in a folder, written to be beside them."""
    found = load_runs(folder)
    report = build_report(found.runs, spec)
    page = table_files(report, found, page or folder)["index.html"].decode()
    return report, re.sub('data:image/png;base64,[^"]+', "data:", page)


def body(page, name):
    """The text of a section, tags taken out."""
    section = page.partition(f"<h2>{name}</h2>")[2].partition("<h2>")[0]
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", section)).split())


@pytest.fixture
def study(tmp_path):
    for seed in range(4):
        write_run(tmp_path, "batch", seed, top1=0.88 + 0.001 * seed, loss=0.3)
        write_run(tmp_path, "online_clamp", seed, top1=0.86 + 0.001 * (3 * seed % 4), loss=0.31)
    write_run(tmp_path, "group", done=2)
    return tmp_path


def test_the_first_screen_says_what_was_run_and_what_came_out(study, spec):
    report, page = made(study, spec)
    assert page_words.what_was_run(report) == "9 runs of 3 normalizers: 8 finished, 1 not finished."
    found = page_words.what_came_out(report)
    clamp = ("different", "OnlineNorm (activation clamping) − BatchNorm", "-2.00 points", "")
    assert clamp in found and found[-1][0] == "not comparable" and "ImageNet" in found[-1][3]
    first = page.partition("<h2>")[0]
    assert (
        '<span class="outcome different">different</span>OnlineNorm (activation clamping) − BatchNorm, -2.00' in first
    )
    assert "9 runs of 3" in first and "88.15 %" in first and "86.15 %" in first


def test_without_a_run_the_page_says_so(tmp_path, spec):
    write_run(tmp_path, "batch")
    found = load_runs(tmp_path)
    none = type(found)(found.runs[:0], found.epochs[:0])
    report = build_report(none.runs, spec)
    assert page_words.what_was_run(report) == "No run yet." and draw_intervals(report) == b""
    page = table_files(report, none, tmp_path)["index.html"].decode()
    assert "<h2>Intervals" not in page and "<h2>Runs" not in page


def test_attempts_are_counted(tmp_path, spec):
    kept = write_run(tmp_path, "batch") / "attempts" / "1"
    kept.mkdir(parents=True)
    (kept / "failed.json").write_text('{"kind": "diverged", "step": 3, "epoch": 1}')
    (kept / "failed.txt").write_text("loss is NaN in step 3\n")
    report, page = made(tmp_path, spec)
    assert "ntervals" not in page.partition("<h2>Verdicts")[0], "of one seed there are none"
    assert page_words.what_was_run(report) == "1 run of 1 normalizer in 2 attempts: 1 finished, 1 diverged."


def test_intervals_are_in_the_figure_and_not_in_cells(study, spec):
    report, page = made(study, spec)
    assert "% CI" not in page and "min–max" not in page and "paired by seed" in body(page, "Verdicts")
    assert "paired by seed" in body(page, "Without the clamp, and on statistics estimated anew")
    assert body(page, "Intervals").startswith("Dots are means over seeds, whiskers their 95 % intervals")
    assert "differences with 90 % intervals" in body(page, "Intervals")
    wide, narrow = draw_intervals(report), draw_intervals(report, narrow=True)
    assert wide.startswith(PNG) and narrow.startswith(PNG) and wide != narrow
    assert "-2.00 points, margin ±" in body(page, "Verdicts")


def test_runs_are_rows_that_sort_and_lead_to_their_folders(study, spec, tmp_path):
    _, page = made(study, spec, page=tmp_path / "report" / "of")
    table = page.partition("<h2>Runs</h2>")[2]
    links = re.findall(r'<a href="([^"]+)">([^<]+)</a>', table)
    assert len(links) == 9 and ("../../batch/seed3/", "batch/seed3") in links
    for link, _ in links:
        assert (tmp_path / "report" / "of" / link).resolve().is_dir()
    row = re.search(r"<tr><th scope=.row.><a[^>]*>batch/seed2<.*?</tr>", table, re.DOTALL)[0]
    assert 'data-label="seed" data-by="2"' in row and 'data-by="0.882">88.20 %<' in row
    unfinished = re.search(r"<tr><th scope=.row.><a[^>]*>group/seed0<.*?</tr>", table, re.DOTALL)[0]
    assert '<td data-label="best val accuracy"></td>' in unfinished


def test_the_page_needs_nothing_beside_it_and_escapes_what_it_shows(tmp_path, spec):
    write_run(tmp_path / "a'b & c%20", "batch", environment={"command": "train.py '<script>alert(1)</script>'"})
    _, page = made(tmp_path, spec)
    assert page.count("<script>") == 1 and "&lt;script&gt;alert" in page and "fetch" not in page
    assert not re.search(r"(src|srcset)=[\"'](?!data:)", page) and "@import" not in page and "url(" not in page
    assert re.findall(r'href="([^"]*)"', page) == ["a%27b%20%26%20c%2520/batch/seed0/"]
