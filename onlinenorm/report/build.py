"""Which files come of which frames: a table over normalizers, a sweep, or a folder of studies (`<study>/runs/...`)."""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd

from onlinenorm.errors import ReportError
from onlinenorm.records import lookup
from onlinenorm.report import benchmarks, clamp_figures, figures, render
from onlinenorm.report.ablation import Ablation, build_ablation, clamp_removals
from onlinenorm.report.findings import Findings
from onlinenorm.report.paired import pool_runs
from onlinenorm.report.removal import ANEW, KEPT, REMOVED, joined, removal_epochs, retrained
from onlinenorm.report.runs import Runs, find_run_folders, load_runs
from onlinenorm.report.settings import ReportSpec
from onlinenorm.report.swept import swept
from onlinenorm.report.tables import Report, build_report

MAIN = ("imagenette", "cifar10", "fashion_mnist", "embedded")  # the first with runs is drawn in the summary figure
CLAMPING, VALUES = "online_clamp", "clamp_value"
BATCHES, IMAGENET_NETWORK = "batch_size", "resnet50"


@dataclass(frozen=True)
class Study:
    """One study: its runs, and the table or ablation made of them."""

    runs: Runs
    made: Report | Ablation
    pooled: pd.DataFrame | None = None


def load_studies(root: Path, spec: ReportSpec) -> dict[str, Study]:
    """Studies below `root` by folder name, those that the spec names first; an empty `runs` folder is none.

    Raises ReportError, naming the study, where runs are damaged or cannot share a table.
    """
    if not root.is_dir():
        raise ReportError(f"{root.absolute()}: no such folder. Name the folder that holds studies, e.g. results/study")
    folders = {path.parent.name: path for path in sorted(root.glob("*/runs")) if any(find_run_folders(path))}
    for failure in sorted(root.glob("*/runs/**/failed.txt")):
        former = failure.parent.parent.name == "attempts"  # told by the run that it was an attempt at
        if not former and not (failure.parent / "config.yaml").exists():
            raise ReportError(f"{failure}: this run ended before it began. Start it again, or remove its folder")
    names = [name for name in spec.studies if name in folders]
    studies = {}
    for name in [*names, *(name for name in folders if name not in names)]:
        found = load_runs(folders[name])
        try:
            note = spec.studies[name].note if name in spec.studies else ""
            if any(map(swept, found.runs["name"])):
                studies[name] = Study(found, build_ablation(found.runs, spec, note))
            else:
                studies[name] = Study(found, build_report(found.runs, spec, note), pool_runs(found.runs, spec))
        except ReportError as error:
            raise ReportError(f"{folders[name]}: {error}") from error
    return studies


def table_files(report: Report, study: Runs, page: Path | None = None) -> dict[str, bytes]:
    """table1.md, table1.json and curves.png, and for a folder `page` its index.html, which links to the runs."""
    curves = figures.draw_curves(study, report)
    files = {"table1.md": render.render_markdown(report).encode(), "table1.json": as_json(report), "curves.png": curves}
    if page is not None:
        wide_and_narrow = {
            "curves": (curves, figures.draw_curves(study, report, narrow=True)),
            "intervals": (figures.draw_intervals(report), figures.draw_intervals(report, narrow=True)),
        }
        links = {run.name: quote(os.path.relpath(run.folder, page)) for run in study.runs.itertuples()}
        files["index.html"] = render.render_page(report, wide_and_narrow, study.runs, links).encode()
    return files


def ablation_files(ablation: Ablation) -> dict[str, bytes]:
    """ablation.md, ablation.json and ablation.png."""
    return {
        "ablation.md": render.render_ablation(ablation).encode(),
        "ablation.json": as_json(ablation),
        "ablation.png": figures.draw_ablation(ablation),
    }


def as_json(made: Report | Ablation) -> bytes:
    """All that a report shows, as plain JSON."""

    def plain(thing: Any) -> Any:
        if isinstance(thing, pd.DataFrame):
            return thing.to_dict("records")
        return asdict(thing) if is_dataclass(thing) and not isinstance(thing, type) else str(thing)

    content = {"schema": 1, "heading": made.heading, **vars(made)}
    return (json.dumps(content, indent=2, allow_nan=False, default=plain) + "\n").encode()


def study_files(
    studies: Mapping[str, Study], benchmark: Mapping[str, Any] | None, spec: ReportSpec
) -> dict[str, dict[str, bytes]]:
    """All files by folder relative to that of the studies; "." holds what is told of all of them together."""
    files: dict[str, dict[str, bytes]] = {}
    for name, study in studies.items():
        if isinstance(study.made, Ablation):
            files[name] = ablation_files(study.made)
            continue
        files[name] = table_files(study.made, study.runs)
        if study.pooled is not None and not study.pooled.empty:
            files[name]["paired.md"] = render.render_pooled(study.pooled, spec, study.made.scale_label).encode()
    runs = {name: study.runs for name, study in studies.items()}
    titles = {name: study.title for name, study in spec.studies.items()}
    together: dict[str, bytes] = {}
    if clamping := clamp_figures.draw_clamping(runs, titles):
        together["clamping.png"] = clamping
    if curves := clamp_figures.draw_removal(runs, titles):
        together["removal.png"] = curves
    if ways := clamp_figures.draw_ways(_ways(studies)):
        together["ways.png"] = ways
    if not (removals := clamp_removals(runs)).empty:
        together["removals.png"] = clamp_figures.draw_removals(removals, titles)
    if clamping or not removals.empty:
        picture = "clamping.png" if clamping else None
        together["clamping.md"] = render.render_clamping(runs, picture, bool(ways)).encode()
    if benchmark:
        together["cost.md"] = render.render_cost(benchmark, spec).encode()
        together["imagenet.md"] = render.render_imagenet(benchmark, _trained(studies, spec), spec).encode()
    panels = _panels(studies, benchmark, spec)
    if panels:
        together["overview.png"] = figures.draw_overview(panels)
    return {".": together, **files}


def findings_page(
    template: Path, studies: Mapping[str, Study], benchmark: Mapping[str, Any] | None, spec: ReportSpec
) -> bytes:
    """A page that a person wrote, its `{{ figures }}` (those of `Findings`) filled in from the studies."""
    pooled = {name: study.pooled for name, study in studies.items() if study.pooled is not None}
    made = {name: study.made for name, study in studies.items()}
    found = Findings(made, {name: study.runs for name, study in studies.items()}, pooled, benchmark, spec)
    return render.fill(template.read_text(encoding="utf-8"), found).encode()


def _trained(studies: Mapping[str, Study], spec: ReportSpec) -> dict[str, tuple[float, int]]:
    """Images/s and batch of finished training runs of the ImageNet network at its size that had a GPU to themselves."""
    study, told = studies.get(IMAGENET_NETWORK), spec.studies.get(IMAGENET_NETWORK)
    found: dict[str, tuple[float, int]] = {}
    if told and told.parallel > 1:
        return found
    for run in study.runs.runs.itertuples() if study else ():
        if run.finished and lookup(run.config, "data.image_size") == 224:
            found[run.normalizer] = (run.results["images_per_second"], lookup(run.config, "recipe.batch_size"))
    return found


def _ways(studies: Mapping[str, Study]) -> dict[str, pd.DataFrame]:
    """Ways by the name of their images, each once; of studies that sweep nothing else and have any but the two."""
    found: dict[str, list[pd.DataFrame]] = {}
    for study in studies.values():
        ways = study.made.ways
        if not ways["setting"].any() and not ways["way"].isin([KEPT, REMOVED]).all():
            found.setdefault(study.made.scale_label.partition(",")[0], []).append(ways)
    return {name: joined(parts) for name, parts in found.items()}


def _of_clamping(ways: pd.DataFrame) -> pd.DataFrame:
    return ways[ways["normalizer"] == CLAMPING]


def _panels(studies: Mapping[str, Study], benchmark: Mapping[str, Any] | None, spec: ReportSpec) -> dict[str, Callable]:
    """Panels of the summary figure by title, as far as there are data."""
    panels: dict[str, Callable] = {}
    main, batches = next((studies[name] for name in MAIN if name in studies), None), studies.get(BATCHES)
    if main and isinstance(report := main.made, Report) and report.rows["seeds"].map(len).any():
        name, runs = report.scale_short, main.runs
        panels[f"{name}: a point a seed"] = lambda axis: figures.accuracy_panel(axis, report, runs.runs)
        if len(removal_epochs(runs)):
            panels[f"{name}: validation loss, a line a seed"] = lambda axis: figures.loss_panel(axis, report, runs)
            panels["the clamp removed after each epoch"] = lambda axis: clamp_figures.removal_panel(axis, runs)
        elif VALUES in studies and len(values := _of_clamping(studies[VALUES].made.ways)):
            images = studies[VALUES].made.scale_label.partition(",")[0]
            panels[f"{images}:\nthe clamp removed after training"] = lambda axis: clamp_figures.removal_by_value_panel(
                axis, values
            )
        elif clamped := clamp_figures.clamp_panels({"main": runs}):
            panels["activations beyond the clamp, a line a seed"] = lambda axis: clamp_figures.fraction_panel(
                axis, clamped["main"]
            )
        ways = _ways(studies).get(report.scale_label.partition(",")[0], report.ways[:0])
        several = retrained(ways) & ways["way"].str.contains(ANEW)
        ways = _of_clamping(ways[~several])
        if len(ways) > 2:
            panels[f"{name}: ways to take the clamp away"] = lambda axis: clamp_figures.ways_panel(axis, ways, 34)
    if batches and isinstance(ablation := batches.made, Ablation):

        def draw(axis):
            figures.ablation_panel(axis, ablation, "last_top1")
            axis.legend(frameon=False, fontsize=9)

        panels[f"{ablation.name}, rates by the horizon rule"] = draw
    if studies and benchmark and len(rows := benchmarks.best(benchmark)):
        panels["cost of a training step"] = lambda axis: figures.cost_panel(axis, rows, spec)
    return panels
