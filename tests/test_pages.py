"""All pages of the repository: their links lead somewhere, and their Python runs."""

import re
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

import onlinenorm

ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^()\s]+)\)")


def pages():
    """Markdown files that git tracks, or all of a copy without git."""
    if (ROOT / ".git").exists():
        done = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True)
        return [ROOT / name for name in done.stdout.split()]
    return [path for path in ROOT.rglob("*.md") if not path.relative_to(ROOT).parts[0].startswith((".", "runs"))]


PAGES = [page for page in pages() if page.exists()]


def anchors(text):
    """What GitHub calls the headings of a page: the second of a name gets -1, the third -2."""
    found, counts = set(), {}
    for heading in re.findall(r"^#+ +(.*?) *$", FENCE.sub("", text), re.MULTILINE):
        words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        name = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        counts[name] = counts.get(name, -1) + 1
        found.add(f"{name}-{counts[name]}" if counts[name] else name)
    return found


def test_anchors_are_those_of_github():
    text = "# A b\n```sh\n# none\n```\n## A, `b`: (c)\n## A b\n### [x](y.md) – z\n"
    assert anchors(text) == {"a-b", "a-b-c", "a-b-1", "x--z"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    dead = []
    for link in LINK.findall(FENCE.sub("", text)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            dead.append(link)
    assert dead == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_fit_the_width_of_github(page):
    """Beyond it there is a scroll bar, and the comment behind a command is not read."""
    blocks = re.findall(r"^```(?:bash|sh)\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert [line for block in blocks for line in block.splitlines() if len(line) > 112] == []


def test_the_python_of_pages_runs():
    """That of users, on a network of theirs."""
    ran = 0
    for page in ("README.md", "onlinenorm/deploy/README.md"):
        for block in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL):
            layers = nn.Conv2d(3, 64, 3), onlinenorm.OnlineNorm2d(64), nn.ReLU(), nn.Conv2d(64, 4, 3), nn.BatchNorm2d(4)
            model = nn.Sequential(*layers)
            model(torch.randn(2, 3, 8, 8)).square().mean().backward()
            names = {"model": model, "x": torch.randn(2, 64, 4, 4), "residual": torch.randn(2, 64, 4, 4)}
            exec(compile(block, page, "exec"), names)
            ran += 1
    assert ran >= 2
