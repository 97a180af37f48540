"""Whether an export computes what its source computes, and how fast."""

import statistics
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from onlinenorm.deploy.forms import Logits
from onlinenorm.training.accuracy import predicted


@dataclass
class Agreement:
    """How the logits of a network agree with a reference over `images` images; accuracies where labels are known."""

    images: int = 0
    max_difference: float = 0.0
    changed_predictions: int = 0
    correct: int = 0
    labelled: int = 0

    @property
    def top1(self) -> float | None:
        return self.correct / self.labelled if self.labelled else None

    def add(self, logits: Tensor, reference: Tensor, labels: Tensor) -> None:
        difference = (logits.double() - reference.double()).abs().max()
        # unlike max(), this keeps NaN
        self.max_difference = float(torch.maximum(difference, difference.new_tensor(self.max_difference)))
        self.images += len(labels)
        prediction = predicted(logits)
        self.changed_predictions += int((prediction != predicted(reference)).sum())
        self.correct += int((prediction == labels).sum())
        self.labelled += int((labels >= 0).sum())

    def as_dict(self) -> dict[str, float | int | None]:
        return {
            "max_logit_difference": self.max_difference,
            "changed_predictions": self.changed_predictions,
            "top1": self.top1,
            "images": self.images,
        }

    def within(self, tolerance: float) -> bool:
        return self.images > 0 and self.max_difference <= tolerance and self.changed_predictions == 0


@torch.no_grad()
def agreements(
    candidates: Mapping[str, tuple[Logits, Logits]], batches: Iterable[tuple[Tensor, Tensor, Tensor]]
) -> dict[str, Agreement]:
    """An `Agreement` for each name's (candidate, reference) on the same images; a shared reference runs once."""
    agreement_of = {name: Agreement() for name in candidates}
    for images, labels, _ in batches:
        references: dict[int, Tensor] = {}
        for name, (candidate, reference) in candidates.items():
            if id(reference) not in references:
                references[id(reference)] = reference(images)
            agreement_of[name].add(candidate(images), references[id(reference)], labels)
    return agreement_of


@torch.no_grad()
def latency_ms(network: Logits, images: Tensor, runs: int) -> float:
    """Median wall time of one call on the CPU, milliseconds, after a quarter of `runs` to warm up."""
    times = []
    for run in range(runs + max(runs // 4, 2)):
        start = time.perf_counter()
        network(images)
        if run >= max(runs // 4, 2):
            times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)
