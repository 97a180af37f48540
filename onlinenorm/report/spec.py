"""What a report compares runs with: onlinenorm/report/published.yaml as checked, plain objects."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from onlinenorm.errors import ReportError
from onlinenorm.scales import UNKNOWN, is_colour, is_label

PUBLISHED = Path(__file__).with_name("published.yaml")
# Okabe-Ito and neighbours, for normalizers that published.yaml does not name; distinct for the colour-blind.
_SPARE_COLOURS = ("#882255", "#44AA99", "#332288", "#999933", "#AA4499", "#117733")


@dataclass(frozen=True)
class Published:
    """A published row: losses in nats, accuracies as fractions; `epochs` says in words where they were reached."""

    best_loss: float
    best_top1: float
    source: str
    epochs: str = ""


@dataclass(frozen=True)
class RowSpec:
    """One normalizer's row: label, colour, published values if any, and why no clamp is removed if none is."""

    label: str
    colour: str
    published: Published | None = None
    removal: str | None = None


@dataclass(frozen=True)
class Scale:
    """Name of an image set as printed: in full, and short for a column head."""

    label: str
    short: str


@dataclass(frozen=True)
class SettingSpec:
    """One entry of the published setting, looked up at `key` (dotted paths, first hit wins) in a run's config."""

    name: str
    key: list[str]
    value: Any
    decisive: bool = False
    only: list[str] = field(default_factory=list)
    note: str = ""


@dataclass(frozen=True)
class StudySpec:
    """A study in a folder of studies: its title, the command that makes its runs, and what their data do not tell."""

    title: str
    command: str
    note: str = ""

    @property
    def side_by_side(self) -> int:
        """How many of its runs shared a machine, by --parallel in the command."""
        found = re.search(r"--parallel (\d+)", self.command)
        return int(found[1]) if found else 1


@dataclass(frozen=True)
class ReportSpec:
    """Everything that is fixed before runs are looked at; `margins` maps scale -> metric -> margin."""

    title: str
    rows: dict[str, RowSpec]
    further_rows: dict[str, RowSpec]
    comparisons: list[tuple[str, str]]
    alpha: float
    confidence: float
    margins: dict[str, dict[str, float]]
    scales: dict[str, Scale]
    published_setting: list[SettingSpec]
    studies: dict[str, StudySpec]

    def row(self, normalizer: str) -> RowSpec:
        """The row of a normalizer; one that the file does not name gets its own name as label and a spare colour."""
        known = {**self.further_rows, **self.rows}
        spare = _SPARE_COLOURS[sum(map(ord, normalizer)) % len(_SPARE_COLOURS)]
        return known.get(normalizer) or RowSpec(label=normalizer, colour=spare)

    def with_rows_of(self, runs: Iterable[Any]) -> "ReportSpec":
        """With the rows that the normalizers' own files describe (``_label_``, ``_colour_``), where this one does not.

        A label that another row has is told apart by the normalizer's name; spare colours are given once.
        """
        rows = {**self.further_rows}
        for run in sorted(runs, key=lambda run: run.name):
            node, name = run.config.get("normalizer"), run.normalizer
            if name in self.rows or name in rows or not isinstance(node, dict):
                continue
            row, labels = self.row(name), {known.label for known in (*self.rows.values(), *rows.values())}
            label, colour = node.get("_label_"), node.get("_colour_")
            label = label if is_label(label) else row.label
            label = f"{label} ({name})" if label in labels else label
            used = {known.colour for known in (*self.rows.values(), *rows.values())}
            spare = next((spare for spare in (row.colour, *_SPARE_COLOURS) if spare not in used), row.colour)
            rows[name] = replace(row, label=label, colour=colour if is_colour(colour) else spare)
        return replace(self, further_rows=rows)

    def scale(self, name: str) -> Scale:
        """A scale's printed names: those of the file, else of a data set of the user's own its label.

        "unknown" stands for no run that is done, and a configuration that cannot tell.
        """
        if name == UNKNOWN:
            return Scale(label="images not known before a run is done", short="unknown images")
        return self.scales.get(name) or Scale(label=f"{name}, not ImageNet", short=name)


def load_spec() -> ReportSpec:
    """What the package's published.yaml says."""
    return parse_spec(yaml.safe_load(PUBLISHED.read_text(encoding="utf-8")))


def parse_spec(content: Mapping[str, Any]) -> ReportSpec:
    """ReportSpec from the plain content of published.yaml; ReportError on keys that it lacks or does not know."""
    try:
        equivalence = dict(content["equivalence"])
        spec = ReportSpec(
            title=content["title"],
            rows={name: _row(row) for name, row in content["rows"].items()},
            further_rows={name: _row(row) for name, row in content.get("further_rows", {}).items()},
            comparisons=[(first, second) for first, second in content["comparisons"]],
            alpha=equivalence["alpha"],
            confidence=equivalence["confidence"],
            margins=equivalence["margins"],
            scales={name: Scale(**scale) for name, scale in content["scales"].items()},
            published_setting=[SettingSpec(**entry) for entry in content["published_setting"]],
            studies={name: StudySpec(**study) for name, study in content.get("studies", {}).items()},
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ReportError(f"{PUBLISHED}: {type(error).__name__}: {error}") from error
    if not 0 < spec.alpha < 0.5 or not 0 < spec.confidence < 1:
        raise ReportError(f"{PUBLISHED}: alpha must lie in (0, 0.5) and confidence in (0, 1)")
    for scale in spec.scales:
        margins = spec.margins.get(scale, {})
        if set(margins) != {"best_top1", "best_loss"} or min(margins.values()) <= 0:
            raise ReportError(f"{PUBLISHED}: margins of {scale} must be positive: best_top1 and best_loss")
    return spec


def _row(content: Mapping[str, Any]) -> RowSpec:
    content = dict(content)
    published = content.pop("published", None)
    return RowSpec(**content, published=Published(**published) if published else None)
