"""Training by several programs at the weights of one of them: how far each is from it, where rounding cannot grow."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from math import sqrt
from statistics import fmean, median

import torch
from torch import Tensor, nn

STATE = ("running_mean", "running_var", "control_u", "control_v")
SLACK, FACTOR = 5.0, 5.0
WINDOW = 10  # steps
Batch = tuple[Tensor, Tensor]


class Program:
    """A network and its step, (images, labels) -> loss, and what is known of its gradients.

    Args:
        network: of parameters named alike in all programs.
        step: compiled, captured, or as it is.
        dtype: of autocast; None for none.
        layout: of the images.
        rounding: share of itself by which each pixel is moved, up or down.
        seed: of which of them goes up.
    """

    def __init__(
        self,
        network: nn.Module,
        step: Callable[[Tensor, Tensor], Tensor],
        dtype: torch.dtype | None = None,
        layout: torch.memory_format = torch.channels_last,
        rounding: float = 0.0,
        seed: int = 0,
    ):
        self.network, self.step, self.dtype, self.layout = network, step, dtype, layout
        self.rounding, self.seed = rounding, seed
        self.losses: list[float] = []
        self.products: dict[str, Tensor] = {}  # of each parameter g . r, r . r and |g - r|^2, summed over steps
        self.states: dict[str, list[Tensor]] = defaultdict(list)  # at the end of each window of steps
        self._start = {name: value.clone() for name, value in network.state_dict().items()}

    def restart(self) -> None:
        """Weights and states as at first, nothing recorded."""
        self.network.load_state_dict(self._start)
        self.losses, self.products, self.states = [], {}, defaultdict(list)

    def pass_over(self, batch: Batch) -> dict[str, Tensor]:
        """Gradients of the loss, which is recorded."""
        images, labels = batch
        device = next(self.network.parameters()).device
        if self.rounding:
            generator = torch.Generator().manual_seed(1000 * self.seed + len(self.losses))
            signs = 2 * torch.randint(2, images.shape, generator=generator) - 1
            images = images * (1 + self.rounding * signs)
        images, labels = images.to(device, memory_format=self.layout), labels.to(device)
        self.network.zero_grad(set_to_none=True)
        with torch.autocast(device.type, self.dtype, enabled=self.dtype is not None, cache_enabled=False):
            loss = self.step(images, labels)
        loss.backward()
        self.losses.append(loss.item())
        return {name: p.grad.float() for name, p in self.network.named_parameters() if p.grad is not None}

    @torch.no_grad()
    def take(self, leader: "Program") -> None:
        for own, given in zip(self.network.parameters(), leader.network.parameters(), strict=True):
            own.copy_(given)

    def compare(self, gradients: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
        for name, r in truth.items():
            g = gradients[name]
            sums = torch.stack([(g * r).sum(), (r * r).sum(), (g - r).square().sum()]).double()
            self.products[name] = self.products[name] + sums if name in self.products else sums

    def note_states(self) -> None:
        for name, tensor in self.network.state_dict().items():
            if name.rpartition(".")[2] in STATE:
                self.states[name].append(tensor.clone())


def train(programs: list[Program], batches: Iterable[Batch], rate: float, leader: Program | None = None) -> None:
    """SGD of each, or of the leader, whose weights all others take before every step, with states of their own."""
    every = programs if leader is None else [leader, *programs]
    for program in every:
        program.restart()
    learning = programs if leader is None else [leader]
    optimizers = [torch.optim.SGD(program.network.parameters(), rate, 0.9) for program in learning]
    for count, batch in enumerate(batches, 1):
        truth = leader.pass_over(batch) if leader else {}
        for program in programs:
            if leader:
                program.take(leader)
            program.compare(program.pass_over(batch), truth)
        for optimizer in optimizers:
            optimizer.step()
        for program in every if count % WINDOW == 0 else ():
            program.note_states()


def ratios(program: Program, controls: list[Program], reference: Program) -> dict[str, float]:
    """How far a program is from the reference, over what rounding explains, by what is compared: 1 is the limit.

    Controls compute the same as the program with other rounding. If led, there are two numbers of each parameter over
    all steps: the slope of the gradient over the reference's, g . r / r . r, in which rounding averages out, so that a
    percent shows; and the distance |g - r| / |r|. The slope may be as far from 1 as a control's, and SLACK times the
    range of controls' slopes more. Distances, those of states and of mean losses too, both of all windows, may be
    FACTOR times the farthest control's. Ranges and distances count as the median one of their kind at least.
    """
    every = _side_by_side([_slopes(one) for one in controls])
    least = _at_least_median({name: max(slopes) - min(slopes) for name, *slopes in every})
    found: dict[str, float] = {}
    for name, *slopes in every:
        allowed = max(abs(slope - 1) for slope in slopes) + SLACK * least[name]
        found[f"slope of {name}"] = abs(_slopes(program)[name] - 1) / allowed
    for measure in (_distances, partial(_state_distances, of=reference), partial(_loss_distance, of=reference)):
        allowed_of = _at_least_median({name: max(far) for name, *far in _side_by_side([measure(c) for c in controls])})
        found |= {name: value / (FACTOR * allowed_of[name]) for name, value in measure(program).items()}
    return found


def _side_by_side(tables: list[dict[str, float]]) -> list[tuple]:
    return [(name, *(table[name] for table in tables)) for name in tables[0]]


def _at_least_median(values: dict[str, float]) -> dict[str, float]:
    """Each value, or the median of those whose names end alike if that is larger."""
    kinds: dict[str, list[float]] = defaultdict(list)
    for name, value in values.items():
        kinds[_kind(name)].append(value)
    return {name: max(value, median(kinds[_kind(name)])) for name, value in values.items()}


def _kind(name: str) -> str:
    owner, _, leaf = name.rpartition(".")
    return leaf if leaf != "weight" or "conv" not in owner else "convolution"


def _slopes(program: Program) -> dict[str, float]:
    return {name: (sums[0] / sums[1]).item() for name, sums in program.products.items()}


def _distances(program: Program) -> dict[str, float]:
    return {f"gradient of {name}": (sums[2] / sums[1]).sqrt().item() for name, sums in program.products.items()}


def _state_distances(program: Program, of: Program) -> dict[str, float]:
    def norm(tensors: Iterable[Tensor]) -> Tensor:
        return torch.stack([t.square().sum() for t in tensors]).sum().sqrt()

    pairs = {name: (program.states[name], truth) for name, truth in of.states.items()}
    return {
        name: (norm(a - b for a, b in zip(own, truth, strict=True)) / norm(truth)).item()
        for name, (own, truth) in pairs.items()
    }


def _loss_distance(program: Program, of: Program) -> dict[str, float]:
    apart = [a - b for a, b in zip(program.losses, of.losses, strict=True)]
    means = [fmean(apart[i : i + WINDOW]) for i in range(0, len(apart), WINDOW)]
    return {"loss": sqrt(fmean(mean * mean for mean in means))}
