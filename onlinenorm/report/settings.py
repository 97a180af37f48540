"""What runs are held against (published.yaml), what they share, and where they depart from the published setting."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from onlinenorm.errors import ReportError
from onlinenorm.records import lookup
from onlinenorm.report.runs import frame, read_yaml
from onlinenorm.report.statistics import NOT_COMPARABLE, Verdict, compare_rows
from onlinenorm.scales import COMPARABLE, UNKNOWN, is_colour, is_label

PUBLISHED = Path(__file__).with_name("published.yaml")
NOT_SET = "not set"
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
class Elsewhere:
    """What was published on another scale: the table's title, normalizer -> values, and where its setting differs.

    `setting` maps keys of the published setting to their values there; None: the key says nothing there.
    """

    title: str
    rows: dict[str, Published]
    setting: dict[str, Any]


@dataclass(frozen=True)
class StudySpec:
    """A study in a folder of studies: its title, the sweep that makes its runs, and what their data do not tell.

    `parallel` of its runs shared a machine at a time.
    """

    title: str
    sweep: str
    note: str = ""
    parallel: int = 1

    @property
    def command(self) -> str:
        """What makes its runs."""
        return self.sweep + (f" --parallel {self.parallel}" if self.parallel > 1 else "")


@dataclass(frozen=True)
class ReportSpec:
    """Everything that is fixed before runs are looked at; `margins` maps scale -> metric -> margin.

    Further rows that are there are each compared with the row `baseline`, after the pairs of `comparisons`.
    The published values are of `published_scale`; those of other scales are in `elsewhere`. `key_names` tells keys
    that studies sweep and `published_setting` has not.
    """

    title: str
    rows: dict[str, RowSpec]
    further_rows: dict[str, RowSpec]
    comparisons: list[tuple[str, str]]
    baseline: str
    alpha: float
    confidence: float
    margins: dict[str, dict[str, float]]
    scales: dict[str, Scale]
    published_setting: list[SettingSpec]
    studies: dict[str, StudySpec]
    elsewhere: dict[str, Elsewhere]
    key_names: dict[str, str]
    published_scale: str = COMPARABLE

    def row(self, normalizer: str) -> RowSpec:
        """The row of a normalizer; one that the file does not name gets its own name as label and a spare colour."""
        known = {**self.further_rows, **self.rows}
        spare = _SPARE_COLOURS[sum(map(ord, normalizer)) % len(_SPARE_COLOURS)]
        return known.get(normalizer) or RowSpec(label=normalizer, colour=spare)

    def extra_rows(self, runs: pd.DataFrame) -> list[str]:
        """Normalizers of the runs beside those of `rows`, in the order of the file, then by name."""
        found = set(runs["normalizer"]) - set(self.rows)
        return [*(name for name in self.further_rows if name in found), *sorted(found - set(self.further_rows))]

    def pairs(self, runs: pd.DataFrame) -> list[tuple[str, str]]:
        """What is compared with what in a table of these runs: the first minus the second."""
        return [*self.comparisons, *((name, self.baseline) for name in self.extra_rows(runs))]

    def with_rows_of(self, runs: pd.DataFrame) -> "ReportSpec":
        """With the rows that the normalizers' own files describe (``_label_``, ``_colour_``), where this one does not.

        A label that another row has is told apart by the normalizer's name; spare colours are given once.
        """
        rows = {**self.further_rows}
        for run in runs.sort_values("name").itertuples():
            node, name = run.config.get("normalizer"), run.normalizer
            if name in self.rows or name in rows or not isinstance(node, dict):
                continue
            row, labels = self.row(name), {known.label for known in (*self.rows.values(), *rows.values())}
            label, colour = node.get("_label_"), node.get("_colour_")
            label = str(label) if is_label(label) else row.label
            label = f"{label} ({name})" if label in labels else label
            used = {known.colour for known in (*self.rows.values(), *rows.values())}
            spare = next((spare for spare in (row.colour, *_SPARE_COLOURS) if spare not in used), row.colour)
            rows[name] = replace(row, label=label, colour=str(colour) if is_colour(colour) else spare)
        return replace(self, further_rows=rows)

    def published_on(self, scale: str) -> "ReportSpec":
        """With what was published on a scale, where something was."""
        if (found := self.elsewhere.get(scale)) is None:
            return self

        def replaced(rows: dict[str, RowSpec]) -> dict[str, RowSpec]:
            return {name: replace(row, published=found.rows.get(name)) for name, row in rows.items()}

        values = [(entry, found.setting.get(entry.key[0], entry.value)) for entry in self.published_setting]
        setting = [replace(entry, value=value) for entry, value in values if value is not None]
        rows, further = replaced(self.rows), replaced(self.further_rows)
        return replace(
            self, title=found.title, rows=rows, further_rows=further, published_setting=setting, published_scale=scale
        )

    def margin(self, metric: str, scale: str) -> float:
        """Within what two figures are equivalent; a scale that has no margins gets ImageNet's, and no verdict."""
        return self.margins.get(scale, self.margins[COMPARABLE])[metric]

    def compare(
        self, first: Mapping[int, float], second: Mapping[int, float], metric: str, scale: str, diverged: Sequence[str]
    ) -> Verdict:
        """`compare_rows` within the margin of a scale."""
        verdict = compare_rows(first, second, self.margin(metric, scale), self.alpha, diverged)
        if first and second and scale not in self.margins:
            reason = f"onlinenorm/report/published.yaml has no margin for {self.scale(scale).short}"
            return Verdict(NOT_COMPARABLE, reason, verdict.difference)
        return verdict

    def scale(self, name: str) -> Scale:
        """A scale's printed names: those of the file, else of a data set of the user's own its label.

        "unknown" stands for no run that is done, and a configuration that cannot tell.
        """
        if name == UNKNOWN:
            return Scale(label="images not known before a run is done", short="unknown images")
        return self.scales.get(name) or Scale(label=f"{name}, not ImageNet", short=name)


def load_spec() -> ReportSpec:
    """What the package's published.yaml says."""
    return parse_spec(read_yaml(PUBLISHED))


def parse_spec(content: Mapping[str, Any]) -> ReportSpec:
    """ReportSpec from the plain content of published.yaml; ReportError on keys that it lacks or does not know."""
    try:
        equivalence = dict(content["equivalence"])
        spec = ReportSpec(
            title=content["title"],
            rows={name: _row(row) for name, row in content["rows"].items()},
            further_rows={name: _row(row) for name, row in content.get("further_rows", {}).items()},
            comparisons=[(first, second) for first, second in content["comparisons"]],
            baseline=content["baseline"],
            alpha=equivalence["alpha"],
            confidence=equivalence["confidence"],
            margins=equivalence["margins"],
            scales={name: Scale(**scale) for name, scale in content["scales"].items()},
            published_setting=[SettingSpec(**entry) for entry in content["published_setting"]],
            studies={name: StudySpec(**study) for name, study in content.get("studies", {}).items()},
            elsewhere={name: _elsewhere(found) for name, found in content.get("elsewhere", {}).items()},
            key_names=dict(content.get("key_names", {})),
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


def _elsewhere(content: Mapping[str, Any]) -> Elsewhere:
    rows = {name: Published(**row) for name, row in content["rows"].items()}
    return Elsewhere(title=content["title"], rows=rows, setting=content["setting"])


def planned_scale(run: Any) -> str | None:
    """Scale of a run that is not done, where its configuration tells it; a folder of ImageNet's layout does not."""
    target = lookup(run.config, "data._target_", "")
    if target == "onlinenorm.data.FashionMNIST":
        return "embedded" if lookup(run.config, "data.embedded") else "fashion_mnist"
    names = {"Synthetic": "synthetic", "CIFAR10": "cifar10", "CIFAR100": "cifar100"}  # photographs: if they are whole
    names |= {"Imagenette": "imagenette", "TinyImageNet": "tiny_imagenet"}
    return {f"onlinenorm.data.{name}": scale for name, scale in names.items()}.get(target)


def departures(configs: Iterable[tuple[str, dict[str, Any]]], setting: Sequence[SettingSpec]) -> pd.DataFrame:
    """Entries of the published setting that runs, each a normalizer and its configuration, do not share.

    In the file's order; not set counts as differing. `normalizers` is empty where it holds for all rows.
    """
    configs, found = list(configs), []
    for entry in setting:
        actual: dict[str, tuple[Any, list[str]]] = {}
        for normalizer, config in configs:
            if entry.only and normalizer not in entry.only:
                continue
            value = next((v for key in entry.key if (v := lookup(config, key, NOT_SET)) != NOT_SET), NOT_SET)
            if not same(value, entry.value):
                names = actual.setdefault(repr(value), (value, []))[1]
                if normalizer not in names:
                    names.append(normalizer)
        for value, names in actual.values():
            rows = names if entry.only else []
            found.append((entry.name, entry.value, value, entry.decisive, rows, entry.note))
    return frame(found, ("name", "published", "actual", "decisive", "normalizers", "note"))


def same(first: Any, second: Any) -> bool:
    """Equality that takes 1 and 1.0, 0.1 and 0.1 + 1e-17, and (1, 2) and [1, 2] for the same."""
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    if isinstance(first, bool) or isinstance(second, bool):
        return first is second
    if isinstance(first, int | float) and isinstance(second, int | float):
        return math.isclose(first, second, rel_tol=1e-9)
    return first == second
