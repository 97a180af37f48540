"""The LightningModule: what one step of training and one batch of validation do."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from onlinenorm.errors import Diverged, RunError
from onlinenorm.normalizers import average_statistics, gather_statistics, merged
from onlinenorm.training.accuracy import full_precision, predicted, rank
from onlinenorm.training.clamping import ClampMeter, ClampSchedule
from onlinenorm.training.cuda_graph import GraphedStep
from onlinenorm.training.recipe import Recipe, build_optimizer, build_schedule, lr_of_step

IGNORED = -1  # label of an image that could not be read


class ImageClassifier(pl.LightningModule):
    """Cross entropy of a network's logits, stepped as a `Recipe` says.

    Batches are (images, labels, indices); images (N, C, H, W), or (N, K, C, H, W) for K crops whose probabilities are
    averaged. Labels of -1 are left out. Training and validation add to sums on the device (`train_sums`, `val_sums`:
    loss in nats, top-1, top-5, images), so that no step waits for the device.

    Args:
        network: (N, C, H, W) -> (N, classes) logits.
        recipe: the optimisation.
        channels_last: keep images and convolutions in that memory format.
    """

    def __init__(self, network: nn.Module, recipe: Recipe, channels_last: bool = True):
        super().__init__()
        self.network = network
        self.recipe = recipe
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.network.to(memory_format=self.memory_format)
        self.train_sums = self.val_sums = torch.zeros(4, dtype=torch.float64)
        self.bad_step = torch.tensor(-1)
        self.graph: GraphedStep | None = None  # set where training replays CUDA graphs
        self.clamps = ClampSchedule(network, recipe)
        self.clamp_meter: ClampMeter | None = None  # of the last validation
        self.collected: list[Tensor] | None = None  # a list: validation keeps (index, label, prediction) of each batch
        self.schedule: Any = None
        self._schedule_state: dict | None = None

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images, or the logarithm of mean probabilities where images come in crops."""
        images = images.to(self.dtype)  # float64 under 64-true
        if images.dim() == 4:
            return self.network(images.contiguous(memory_format=self.memory_format))
        crops = self.network(images.flatten(0, 1).contiguous(memory_format=self.memory_format))
        log_p_NKC = F.log_softmax(crops.float(), dim=1).unflatten(0, images.shape[:2])
        return log_p_NKC.logsumexp(1) - torch.tensor(float(images.shape[1]), device=crops.device).log()

    def configure_optimizers(self):
        # The schedule is stepped in on_train_epoch_end and saved here: Lightning would step one that waits for a metric
        # only after the end-of-epoch checkpoint has been written.
        optimizer = build_optimizer(self.network, self.recipe)
        self.schedule = build_schedule(optimizer, self.recipe)
        if self._schedule_state is not None:
            self.schedule.load_state_dict(self._schedule_state)
        return optimizer

    def configure_callbacks(self) -> list[pl.Callback]:
        return [self.clamps]

    def on_fit_start(self) -> None:
        self.train_sums, self.bad_step = self.train_sums.to(self.device), self.bad_step.to(self.device)

    def on_train_epoch_start(self) -> None:  # not called where a run continues within an epoch
        self.train_sums = torch.zeros_like(self.train_sums)

    def on_train_batch_start(self, batch, batch_idx: int) -> None:
        steps = int(self.trainer.num_training_batches) // self.trainer.accumulate_grad_batches
        if (lr := lr_of_step(self.recipe, self.trainer.global_step + 1, steps)) is not None:
            for group in self.trainer.optimizers[0].param_groups:
                group["lr"] = lr

    def training_step(self, batch, batch_idx: int) -> Tensor:
        images, labels, _ = batch
        smoothing = self.recipe.label_smoothing
        loss, sums = _step(self, images, labels, smoothing) if self.graph is None else self.graph(images, labels)
        self._watch(loss.detach())
        self.train_sums = self.train_sums + sums
        return loss

    def graph_steps(self) -> None:
        """Has training steps replayed as CUDA graphs from the next one on."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]  # set where there is one
        # a quarter of the bytes goes to the graph, which makes the network's input itself; colours are another input
        raw = data.augmentation != "scale_jitter"
        if raw:
            data.raw_training = True

        def step(forward, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            if raw:
                with torch.autocast(images.device.type, enabled=False):
                    images = data.network_input(images)
            return _step(forward, images, labels, self.recipe.label_smoothing)

        self.graph = GraphedStep(self, step, self.trainer.accumulate_grad_batches > 1)

    def _watch(self, loss: Tensor) -> None:
        # the step of the first loss that is not finite, found without asking the device
        first = (self.bad_step < 0) & ~torch.isfinite(loss)
        self.bad_step = self.bad_step.masked_fill(first, self.global_step + 1)

    def assert_finite(self) -> None:
        """Raises Diverged, on every process, where a loss or the network is not finite. Waits for the device."""
        states = [value for value in self.network.state_dict().values() if value.is_floating_point()]
        healthy = torch.stack([torch.isfinite(value).all() for value in states]).all()
        bad_step = torch.where((self.bad_step < 0) & ~healthy, self.global_step, self.bad_step).long()
        if self.trainer.world_size > 1:
            bad_step = self.trainer.strategy.reduce(bad_step, reduce_op="max")
        if (step := int(bad_step)) >= 0:
            what = "the loss" if int(self.bad_step) >= 0 else "a weight or statistic of the network"
            self._refuse(what, step)

    def assert_finite_validation(self, loss: float) -> None:
        """Raises Diverged where the validation loss, already that of all processes, is not finite."""
        if not math.isfinite(loss):
            self._refuse("the validation loss", self.global_step)

    def _refuse(self, what: str, step: int) -> NoReturn:
        lr = self.recipe.lr if self.trainer.state.fn != "fit" else self.trainer.optimizers[0].param_groups[0]["lr"]
        self.trainer.strategy.checkpoint_io.teardown()  # one that is being written counts
        last = Path(self.trainer.default_root_dir, "checkpoints", "last.ckpt")
        kept = f"The last good checkpoint is kept: {last}." if last.exists() else "No checkpoint had been saved yet."
        raise Diverged(
            f"{what} became NaN or infinite at step {step} (epoch {self.current_epoch + 1}, learning rate {lr:g}). "
            f"{kept} To go on, start over in another run_dir with a lower recipe.lr or recipe.batch_size, "
            "with trainer.precision=32-true, or with another normalizer",
            step,
            self.current_epoch + 1,
        )

    def on_validation_epoch_start(self) -> None:
        average_statistics(self.network)  # where each process has a stream of its own: all validate one network
        self.val_sums = torch.zeros(4, dtype=torch.float64, device=self.device)
        self.clamp_meter = ClampMeter(self.network)

    def validation_step(self, batch, batch_idx: int) -> Tensor:
        images, labels, indices = batch
        logits = self(images)
        assert self.clamp_meter is not None
        if self.clamp_meter.layers and self.collected is None and batch_idx % self._metered_every() == 0:
            # once more for the meter, whose hooks a compiled network would not call
            with torch.compiler.set_stance("force_eager"), self.clamp_meter:
                self(images)
        self.val_sums = self.val_sums + _sums(logits, labels, _losses(logits, labels)[1])
        if self.collected is not None:
            self.collected.append(torch.stack([indices, labels, predicted(logits)]).cpu())
        return logits

    def _metered_every(self) -> int:
        # about ten batches, spread over the set: folders come class by class
        return max(1, int(self.trainer.num_val_batches[0]) // 10)

    def clamping(self) -> dict[str, float]:
        """What the last validation saw at the clamps, over all processes; empty where nothing clamps."""
        if self.clamp_meter is None or not self.clamp_meter.layers:
            return {}
        clamped, activations, largest = self.clamp_meter.totals(self.trainer.strategy)
        seen = {"clamped_fraction": clamped / max(activations, 1.0), "max_abs_activation": largest}
        return seen | self.clamps.figures(self)

    def reduced(self, sums: Tensor) -> list[float]:
        """Sums over all processes as (loss, top1, top5, images)."""
        if self.trainer.world_size > 1:
            sums = self.trainer.strategy.reduce(sums.clone(), reduce_op="sum")
        return sums.tolist()

    def on_train_epoch_end(self) -> None:
        if isinstance(self.schedule, ReduceLROnPlateau):
            _, top1, _, images = self.reduced(self.val_sums)
            self.schedule.step(1.0 - top1 / max(images, 1.0))
        else:
            self.schedule.step()

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["schedule"] = self.schedule.state_dict()
        checkpoint["train_sums"] = self.reduced(self.train_sums)
        # Statistics that processes keep for themselves: their mean in the weights, and each as it is beside them, so
        # that as many processes continue exactly, and another number from the mean.
        gathered = {f"network.{name}": table.cpu() for name, table in gather_statistics(self.network).items()}
        gathered = {name: table for name, table in gathered.items() if name in checkpoint["state_dict"]}
        checkpoint["local_statistics"] = gathered
        checkpoint["state_dict"] |= {name: merged(table) for name, table in gathered.items()}

    def load_state_dict(self, *arguments, **options):
        """As of any module; of a checkpoint that does not fit, a RunError names the file."""
        try:
            return super().load_state_dict(*arguments, **options)
        except RuntimeError as error:
            raise RunError(
                f"{self.trainer.ckpt_path}: does not fit the network of config.yaml ({' '.join(str(error).split())}); "
                "delete it to continue from previous.ckpt, or its folder to start over"
            ) from error

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self._schedule_state = checkpoint["schedule"]
        if self.trainer.is_global_zero:  # reduced when saved: the other ranks start from nothing
            self.train_sums = torch.tensor(checkpoint["train_sums"], dtype=torch.float64)
        for name, table in checkpoint["local_statistics"].items():
            if len(table) == self.trainer.world_size:
                checkpoint["state_dict"][name] = table[self.trainer.global_rank]


def _step(
    forward: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(mean loss, sums of the batch) of a training step."""
    logits = forward(images)
    loss, total = _losses(logits, labels, label_smoothing)
    return loss, _sums(logits.detach(), labels, total)


def _losses(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """(mean, sum) of the cross entropy over images with a label: in float32 or better, and in float64."""
    each_N = F.cross_entropy(
        full_precision(logits), labels, ignore_index=IGNORED, reduction="none", label_smoothing=label_smoothing
    )
    # the sum in float64, where float32 values add up exactly: whatever batches and processes the images come in
    return each_N.sum() / (labels != IGNORED).sum().clamp(min=1), each_N.detach().double().sum()


@torch.no_grad()
def _sums(logits: Tensor, labels: Tensor, loss_sum: Tensor) -> Tensor:
    """(loss, top-1, top-5, images) of a batch, in float64."""
    known_N = labels != IGNORED
    rank_N = rank(logits, labels.clamp(min=0))
    counts = [((rank_N < min(places, logits.shape[1])) & known_N).sum() for places in (1, 5)] + [known_N.sum()]
    return torch.stack([value.double() for value in (loss_sum, *counts)])
