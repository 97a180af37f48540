"""The optimisation recipe as plain values, and the rules that turn it into groups, optimizer and schedule."""

import itertools
import math
from dataclasses import dataclass

from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler, MultiStepLR, ReduceLROnPlateau

from onlinenorm.arguments import check_choice
from onlinenorm.data.transforms import AUGMENTATIONS, EVALUATIONS
from onlinenorm.errors import ArgumentError
from onlinenorm.text import plural
from onlinenorm.training.roles import parameter_roles

SCALINGS = ("horizon", "linear", "none")
SCHEDULES = ("step", "plateau", "cosine")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides how the weights move, apart from network, normalizer and data.

    Args:
        epochs: passes over the training set, at least 1.
        batch_size: images a step over all processes, at least 1.
        base_batch_size: the batch size that ``lr`` and ``momentum`` are meant for.
        lr, momentum: of SGD at ``base_batch_size``; lr > 0, 0 <= momentum < 1.
        scaling: rule to another batch size, see ``scaled_lr_momentum``: "horizon", "linear" or "none".
        weight_decay: L2 coefficient of the decayed parameters, >= 0.
        decay_norm_weight, decay_norm_bias: whether gammas and betas of normalizers are decayed.
        decay_bias: whether biases of other layers are decayed. Weights of convolutions and linear layers always are.
        schedule: "step" or "plateau", see ``build_schedule``, or "cosine", see ``lr_of_step``.
        milestones: for "step": numbers of completed epochs, rising, each in 1..epochs - 1.
        lr_factor: factor of each drop of the learning rate, in (0, 1).
        plateau_patience: for "plateau": epochs without improvement that are let pass, >= 0.
        plateau_threshold: for "plateau": a fall of the error by more than this counts as improvement, a fraction >= 0.
        warmup_epochs: first epochs over which the learning rate rises linearly, step by step; 0 for none.
        warmup_lr: rate that it rises from, at ``batch_size``, >= 0; above ``scaled_lr`` it is that.
        label_smoothing: share of each target spread evenly over all classes, in [0, 1), in the training loss alone.
        clamp_raise_epochs: epochs, before those of ``clamp_off_epochs``, each of which doubles the clamp value; >= 0.
        clamp_off_epochs: last epochs trained without the clamp, >= 0.
        removal_every_epoch: measure the removal of the clamp in each validation, not the last alone.
        reestimate_images: training images that normalizers' statistics are estimated anew on at the end, without the
            clamp, for one more validation; 0 for none.
        augmentation: of training images: "random_resized_crop", "scale_jitter", "pad_crop" or "none".
        evaluation: views of validation images: "center_crop" or "ten_crop".

    Raises:
        ValueError: a value of the wrong kind or out of range; the message starts with the key.
    """

    epochs: int
    batch_size: int
    base_batch_size: int = 256
    lr: float = 0.1
    momentum: float = 0.9
    scaling: str = "horizon"
    weight_decay: float = 1e-4
    decay_norm_weight: bool = True
    decay_norm_bias: bool = False
    decay_bias: bool = True
    schedule: str = "step"
    milestones: tuple[int, ...] = ()
    lr_factor: float = 0.1
    plateau_patience: int = 5
    plateau_threshold: float = 0.001
    warmup_epochs: int = 0
    warmup_lr: float = 0.0
    label_smoothing: float = 0.0
    clamp_raise_epochs: int = 0
    clamp_off_epochs: int = 0
    removal_every_epoch: bool = False
    reestimate_images: int = 0
    augmentation: str = "random_resized_crop"
    evaluation: str = "center_crop"

    def __post_init__(self):
        for key in ("epochs", "batch_size", "base_batch_size"):
            _check_whole(key, getattr(self, key), at_least=1)
        for key in ("plateau_patience", "warmup_epochs", "clamp_raise_epochs", "clamp_off_epochs", "reestimate_images"):
            _check_whole(key, getattr(self, key), at_least=0)
        _check_number("lr", self.lr, "> 0", lambda value: value > 0)
        _check_number("momentum", self.momentum, "in [0, 1)", lambda value: 0 <= value < 1)
        _check_number("weight_decay", self.weight_decay, ">= 0", lambda value: value >= 0)
        _check_number("lr_factor", self.lr_factor, "in (0, 1)", lambda value: 0 < value < 1)
        _check_number("plateau_threshold", self.plateau_threshold, ">= 0", lambda value: value >= 0)
        _check_number("warmup_lr", self.warmup_lr, ">= 0", lambda value: value >= 0)
        _check_number("label_smoothing", self.label_smoothing, "in [0, 1)", lambda value: 0 <= value < 1)
        for key in ("decay_norm_weight", "decay_norm_bias", "decay_bias", "removal_every_epoch"):
            if not isinstance(getattr(self, key), bool):
                raise ArgumentError(key, f"must be true or false, got {getattr(self, key)!r}")
        check_choice("scaling", self.scaling, SCALINGS)
        check_choice("schedule", self.schedule, SCHEDULES)
        check_choice("augmentation", self.augmentation, AUGMENTATIONS)
        check_choice("evaluation", self.evaluation, EVALUATIONS)
        object.__setattr__(self, "milestones", _checked_milestones(self.milestones, self.epochs, self.schedule))
        _check_warmup(self)
        if self.clamp_raise_epochs + self.clamp_off_epochs >= self.epochs:
            key = "clamp_off_epochs" if self.clamp_off_epochs else "clamp_raise_epochs"
            raise ArgumentError(
                key,
                f"{plural(self.clamp_raise_epochs, 'epoch')} of raising and {self.clamp_off_epochs} without clamp "
                f"leave none of {self.epochs} with it; use fewer, or normalizer.error_compensation=none",
            )

    @property
    def scaled_lr(self) -> float:
        """Initial learning rate at ``batch_size``."""
        return self._scaled()[0]

    @property
    def first_lr(self) -> float:
        """Learning rate that the warm-up rises from: ``warmup_lr``, and never above ``scaled_lr``."""
        return min(self.warmup_lr, self.scaled_lr)

    @property
    def scaled_momentum(self) -> float:
        """Momentum at ``batch_size``."""
        return self._scaled()[1]

    def _scaled(self) -> tuple[float, float]:
        return scaled_lr_momentum(self.lr, self.momentum, self.batch_size, self.base_batch_size, self.scaling)


def scaled_lr_momentum(
    lr: float, momentum: float, batch_size: int, base_batch_size: int, rule: str
) -> tuple[float, float]:
    """(lr, momentum) for batches of ``batch_size`` from those for batches of ``base_batch_size``; r is their ratio.

    - "horizon": m' = m^r and lr' = lr r (1 - m') / (1 - m). An image's gradient fades over as many later images at
      either size, and in total moves the weights as far: by lr / ((1 - m) base_batch_size).
    - "linear": m' = m and lr' = lr r (Goyal et al. 2017).
    - "none": both unchanged.

    Source of "horizon": Chiley et al. 2019, arXiv 1905.05894.
    """
    ratio = batch_size / base_batch_size
    if rule == "horizon":
        scaled = momentum**ratio
        return lr * ratio * (1 - scaled) / (1 - momentum), scaled
    if rule == "linear":
        return lr * ratio, momentum
    check_choice("scaling", rule, SCALINGS)
    return lr, momentum


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict]:
    """Groups for a torch optimizer: decayed parameters, then those without weight decay; an empty one is left out.

    Each has "params" in the model's order, "weight_decay" and "name" ("decay" or "no_decay").
    """
    decays = {
        "weight": True,
        "bias": recipe.decay_bias,
        "norm_weight": recipe.decay_norm_weight,
        "norm_bias": recipe.decay_norm_bias,
    }
    parameters = dict(model.named_parameters(remove_duplicate=False))
    decayed: list[nn.Parameter] = []
    exempt: list[nn.Parameter] = []
    for name, role in parameter_roles(model).items():
        (decayed if decays[role] else exempt).append(parameters[name])
    groups = [
        {"params": decayed, "weight_decay": recipe.weight_decay, "name": "decay"},
        {"params": exempt, "weight_decay": 0.0, "name": "no_decay"},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, recipe: Recipe) -> SGD:
    """SGD at the scaled learning rate and momentum: b' = m b + g + wd w, then w' = w - lr b'.

    The learning rate stands outside the momentum buffer b, so a drop acts on past gradients too.
    """
    groups = parameter_groups(model, recipe)
    on_gpu = all(parameter.is_cuda for parameter in model.parameters())
    return SGD(groups, lr=recipe.scaled_lr, momentum=recipe.scaled_momentum, fused=True if on_gpu else None)


def build_schedule(optimizer: Optimizer, recipe: Recipe) -> LRScheduler:
    """Schedule to be stepped once after each epoch.

    - "step": ``schedule.step()``. After as many completed epochs as a milestone says, the rate is multiplied by
      ``lr_factor``: with milestone 30, epochs 1 to 30 run at the full rate and epoch 31 is the first at the lower one.
    - "plateau": ``schedule.step(val_error)`` with the validation error 1 - top-1 as a fraction. When it has not fallen
      below its best by more than ``plateau_threshold`` for more than ``plateau_patience`` epochs in a row, the rate is
      multiplied by ``lr_factor``.
    - "cosine": nothing; the rate is that of ``lr_of_step``.
    """
    if recipe.schedule != "plateau":
        return MultiStepLR(optimizer, milestones=list(recipe.milestones), gamma=recipe.lr_factor)
    return ReduceLROnPlateau(
        optimizer,
        mode="min",
        factor=recipe.lr_factor,
        patience=recipe.plateau_patience,
        threshold=recipe.plateau_threshold,
        threshold_mode="abs",
        eps=0.0,
    )


def lr_of_step(recipe: Recipe, step: int, steps_per_epoch: int) -> float | None:
    """Learning rate of optimizer step t, from 1, where it changes within epochs; None where it is ``build_schedule``'s.

    With w = ``warmup_epochs`` and T = ``epochs`` in steps, and the scaled rate lr':

    - t <= w: s + (lr' - s) t / w with s = min(warmup_lr, lr') (Goyal et al. 2017, arXiv 1706.02677, section 2.2).
    - then, for the schedule "cosine": lr' (1 + cos(pi (t - 1 - w) / (T - w))) / 2 (Loshchilov and Hutter 2017, arXiv
      1608.03983, without restarts; after a warm-up as He et al. 2019, arXiv 1812.01187).
    """
    warmup, total, lr = recipe.warmup_epochs * steps_per_epoch, recipe.epochs * steps_per_epoch, recipe.scaled_lr
    if step <= warmup:
        return lr + (recipe.first_lr - lr) * (1 - step / warmup)  # ends at lr to the bit
    if recipe.schedule == "cosine":
        return lr * (1 + math.cos(math.pi * (step - 1 - warmup) / (total - warmup))) / 2
    return None


def clamp_factor(recipe: Recipe, epoch: int) -> float | None:
    """What multiplies the clamp value in an epoch, from 1: 1, then 2, 4, ... while it is raised; None: no clamp."""
    without = epoch - (recipe.epochs - recipe.clamp_off_epochs)
    if without > 0:
        return None
    return 2.0 ** max(without + recipe.clamp_raise_epochs, 0)


def _check_whole(key: str, value, at_least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise ArgumentError(key, f"must be a whole number of at least {at_least}, got {value!r}")


def _check_number(key: str, value, expected: str, holds) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or not holds(value):
        raise ArgumentError(key, f"must be a number {expected}, got {value!r}")


def _check_warmup(recipe: Recipe) -> None:
    """Raises ValueError where a warm-up leaves no epoch, or its end would undo a drop of the learning rate."""
    warmup = recipe.warmup_epochs
    if not warmup:
        return
    if warmup >= recipe.epochs:
        raise ArgumentError(
            "warmup_epochs", f"{warmup} of {recipe.epochs} epochs leave none at the full rate; use fewer"
        )
    if recipe.schedule == "plateau":
        raise ArgumentError("warmup_epochs", "schedule=plateau has none; use 0, or recipe.schedule=step or cosine")
    if early := [milestone for milestone in recipe.milestones if milestone < warmup]:
        raise ArgumentError(
            "warmup_epochs", f"the milestone {early[0]} lies within the {warmup} epochs of warm-up; move one of them"
        )


def _checked_milestones(milestones, epochs: int, schedule: str) -> tuple[int, ...]:
    """The milestones as a tuple; ValueError unless whole, strictly rising, within the run and used by the schedule."""
    if isinstance(milestones, (str, int, float)) or milestones is None:
        raise ArgumentError("milestones", f"must be a list of epochs such as [30, 60], got {milestones!r}")
    milestones = tuple(milestones)
    if milestones and schedule != "step":
        raise ArgumentError(
            "milestones",
            f"schedule={schedule} has none; use recipe.milestones=[] or recipe.schedule=step, got {list(milestones)}",
        )
    advice = "or raise recipe.epochs"
    advice = f"use values in 1..{epochs - 1} {advice}" if epochs > 1 else f"use recipe.milestones=[] {advice}"
    for milestone in milestones:
        if isinstance(milestone, bool) or not isinstance(milestone, int) or milestone < 1:
            raise ArgumentError("milestones", f"{milestone!r} is not a whole number of at least 1; {advice}")
        if milestone > epochs:
            raise ArgumentError("milestones", f"{milestone} lies past the last epoch ({epochs}); {advice}")
        if milestone == epochs:
            raise ArgumentError("milestones", f"{milestone} is the last epoch, so nothing runs after it; {advice}")
    if any(later <= earlier for earlier, later in itertools.pairwise(milestones)):
        raise ArgumentError("milestones", f"must rise strictly, got {list(milestones)}")
    return milestones
