"""The LightningModule: what one step of training and one batch of validation do."""

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

import pytorch_lightning as pl
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from onlinenorm.data.network_input import NetworkInput
from onlinenorm.errors import Diverged, RunError
from onlinenorm.normalizers import average_statistics, gather_statistics, merged
from onlinenorm.training.accuracy import full_precision, predicted, rank
from onlinenorm.training.clamping import ClampMeter, ClampSchedule
from onlinenorm.training.cuda_graph import GraphedEvaluation, GraphedStep
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
        # changed in place by each step, which may be captured
        self.val_sums = torch.zeros(4, dtype=torch.float64)
        self.train_sums = torch.zeros(4, dtype=torch.float64)
        self.batches = torch.tensor(0)  # of this fit
        self.bad_batch = torch.tensor(-1)  # the first of them, from 1, whose loss was not finite
        self._resumed_step = 0
        self.graph: GraphedStep | None = None  # set where training replays CUDA graphs
        self._of_raw: Callable[[Tensor], Tensor] | None = None  # where their batches stay uint8
        self._compiled_loss: Callable[[Tensor, Tensor], Tensor] | None = None  # where they are of a compiled network
        self.graphed_evaluation: GraphedEvaluation | None = None  # of validation between its epochs
        self.clamps = ClampSchedule(network, recipe)
        self.clamp_meter: ClampMeter | None = None  # of the last validation
        self.collected: list[Tensor] | None = None  # a list: validation keeps (index, label, prediction) of each batch
        self.exchange: dict[str, Any] | None = None  # of statistics in training, see `normalizers.exchange.Exchange`
        self.schedule: Any = None
        self._schedule_state: dict | None = None

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images, or the logarithm of mean probabilities where images come in crops."""
        if images.dtype is torch.uint8 and self._of_raw is not None:
            return self._of_raw(images)
        images = images.to(self.dtype)  # float64 under 64-true
        if images.dim() == 4:
            return self.network(images.contiguous(memory_format=self.memory_format))
        crops = self.network(images.flatten(0, 1).contiguous(memory_format=self.memory_format))
        log_p_NKC = F.log_softmax(crops.float(), dim=1).unflatten(0, images.shape[:2])
        # filled on the device, where a value from the host could not be captured
        return log_p_NKC.logsumexp(1) - torch.full((), float(images.shape[1]), device=crops.device).log()

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
        self.train_sums, self.val_sums = self.train_sums.to(self.device), self.val_sums.to(self.device)
        self.batches, self.bad_batch = self.batches.to(self.device).zero_(), self.bad_batch.to(self.device).fill_(-1)
        self._resumed_step = self.global_step

    def on_fit_end(self) -> None:
        # Lightning moves the parameters now, and memory is needed
        self.graph = self.graphed_evaluation = self._of_raw = self._compiled_loss = None
        self.trainer.datamodule.raw_training = False  # type: ignore[attr-defined]

    def on_train_epoch_start(self) -> None:  # not called where a run continues within an epoch
        self.train_sums.zero_()

    def on_train_batch_start(self, batch, batch_idx: int) -> None:
        steps = int(self.trainer.num_training_batches) // self.trainer.accumulate_grad_batches
        if (lr := lr_of_step(self.recipe, self.trainer.global_step + 1, steps)) is not None:
            for group in self.trainer.optimizers[0].param_groups:
                group["lr"] = lr

    def training_step(self, batch, batch_idx: int) -> Tensor:
        images, labels, _ = batch
        return self.training_loss(self, images, labels) if self.graph is None else self.graph(images, labels)

    def training_loss(self, forward: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> Tensor:
        """The mean loss of a batch, which is added to `train_sums` and watched; without a word with the host."""
        return (self._compiled_loss or self._loss_of)(forward(images), labels)

    def _loss_of(self, logits: Tensor, labels: Tensor) -> Tensor:
        logits = full_precision(logits)
        loss, total = _losses(logits, labels, self.recipe.label_smoothing)
        with torch.no_grad():
            self.train_sums += _sums(logits, labels, total)
            self.batches += 1
            self._watch(loss)
        return loss

    def graph_steps(self) -> None:
        """Has steps of training and validation replayed as CUDA graphs, captured from the next one.

        The optimizer's step too, and the mean of gradients over processes before it, but where gradients are added up,
        unscaled or clipped between backward and it.
        """
        trainer = self.trainer
        data = trainer.datamodule  # type: ignore[attr-defined]  # set where there is one
        # a quarter of the bytes goes to the graph, which makes the network's input itself; colours are another input
        if data.augmentation != "scale_jitter":
            data.raw_training = True
            self._of_raw = self._raw_network(data.network_input)
        if _is_compiled(self.network):  # some thirty kernels in a few
            self._compiled_loss = torch.compile(self._loss_of)
        accumulates = trainer.accumulate_grad_batches > 1
        between = getattr(trainer.precision_plugin, "scaler", None) is not None or trainer.gradient_clip_val is not None
        optimizer = None if accumulates or between else trainer.optimizers[0]
        state = self.train_sums, self.batches, self.bad_batch
        self.graphed_evaluation = None
        averages = optimizer is not None and trainer.world_size > 1
        self.graph = GraphedStep(self, self.training_loss, state, optimizer, accumulates, averages)

    def _raw_network(self, network_input: NetworkInput) -> Callable[[Tensor], Tensor]:
        """Logits of uint8 images; compiled where the network is, whose first kernel then reads these."""
        network_input.prepare(self.device)  # else the first call does, and the second is compiled anew

        def logits_of(images: Tensor) -> Tensor:
            with torch.autocast(images.device.type, enabled=False):
                x = network_input(images).to(self.dtype)
            return self.network(x.contiguous(memory_format=self.memory_format))

        return torch.compile(logits_of) if _is_compiled(self.network) else logits_of

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        if self.graph is None or self.graph.optimizer is None:
            super().backward(loss, *args, **kwargs)
        else:
            self.graph.backward(loss)

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None) -> None:
        if self.graph is None or self.graph.optimizer is None:
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        else:
            optimizer_closure()
            self.graph.step_optimizer()

    def _watch(self, loss: Tensor) -> None:
        # found without asking the device; the difference is 0 or NaN, in fewer kernels than isfinite takes
        first = (self.bad_batch < 0) & (loss - loss != 0)
        self.bad_batch.copy_(torch.where(first, self.batches, self.bad_batch))

    def bad_step(self) -> Tensor:
        """Step of the first loss that was not finite, over all processes, or -1; every process calls this."""
        accumulated = self.trainer.accumulate_grad_batches
        step = self._resumed_step + (self.bad_batch + accumulated - 1) // accumulated
        return self._of_any_process(step.masked_fill(self.bad_batch < 0, -1))

    def _of_any_process(self, step: Tensor) -> Tensor:
        if self.trainer.world_size > 1:
            dist.all_reduce(step, dist.ReduceOp.MAX)
        return step

    def assert_finite(self) -> None:
        """Raises Diverged, on every process, where a loss or the network is not finite. Waits for the device."""
        step = torch.where(all_finite(self.network.state_dict().values()), -1, self.global_step)
        found, of_network = torch.stack([self.bad_step(), self._of_any_process(step)]).tolist()
        if found >= 0:
            self.refuse("the loss", found)
        if of_network >= 0:
            self.refuse("a weight or statistic of the network", of_network)

    def assert_finite_validation(self, loss: float) -> None:
        """Raises Diverged where the validation loss, already that of all processes, is not finite."""
        if not math.isfinite(loss):
            self.refuse("the validation loss", self.global_step)

    def refuse(self, what: str, step: int) -> NoReturn:
        """Raises Diverged of what stopped being finite at a step."""
        lr = self.trainer.optimizers[0].param_groups[0]["lr"]
        epoch = min(self.current_epoch + 1, self.recipe.epochs)  # after training, the last
        self.trainer.strategy.checkpoint_io.teardown()  # one that is being written counts
        last = Path(self.trainer.default_root_dir, "checkpoints", "last.ckpt")
        kept = f"The last good checkpoint is kept: {last}." if last.exists() else "No checkpoint had been saved yet."
        raise Diverged(
            f"{what} became NaN or infinite at step {step} (epoch {epoch}, learning rate {lr:g}). "
            f"{kept} To go on, start over in another run_dir with a lower recipe.lr or recipe.batch_size, "
            "with trainer.precision=32-true, or with another normalizer",
            step,
            epoch,
        )

    def on_validation_epoch_start(self) -> None:
        average_statistics(self.network)  # where each process has a stream of its own: all validate one network
        self.val_sums = self.val_sums.to(self.device).zero_()
        self.clamp_meter = ClampMeter(self.network)
        if self.graph is not None and self.graphed_evaluation is None:
            state = self.val_sums, *self.buffers()
            self.graphed_evaluation = GraphedEvaluation(self._evaluate, state, self.graph.pool)

    def validation_step(self, batch, batch_idx: int) -> Tensor:
        images, labels, indices = batch
        logits = (self.graphed_evaluation or self._evaluate)(images, labels)
        assert self.clamp_meter is not None
        if self.clamp_meter.layers and self.collected is None and batch_idx % self._metered_every() == 0:
            # once more for the meter, whose hooks a compiled network would not call
            with torch.compiler.set_stance("force_eager"), self.clamp_meter:
                self(images)
        if self.collected is not None:
            self.collected.append(torch.stack([indices.to(labels.device), labels, predicted(logits)]))
        return logits

    def _evaluate(self, images: Tensor, labels: Tensor) -> Tensor:
        logits = self(images)
        self.val_sums += _sums(logits, labels, _losses(logits, labels)[1])
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
        checkpoint["exchange"] = self.exchange
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
        # Lightning makes it one of float64 behind this, when a checkpoint's weights have been rounded to float32
        self.trainer.precision_plugin.convert_module(self)
        self._schedule_state = checkpoint["schedule"]
        self.exchange = checkpoint.get("exchange")  # for a start that has nothing left to train
        if self.trainer.is_global_zero:  # reduced when saved: the other ranks start from nothing
            self.train_sums = torch.tensor(checkpoint["train_sums"], dtype=torch.float64)
        for name, table in checkpoint["local_statistics"].items():
            if len(table) == self.trainer.world_size:
                checkpoint["state_dict"][name] = table[self.trainer.global_rank]


def _is_compiled(network: nn.Module) -> bool:
    """Whether ``network.compile()`` was called."""
    return network._compiled_call_impl is not None


def all_finite(tensors: Iterable[Tensor]) -> Tensor:
    """Whether every element of those of real numbers is finite, on their device: in a few kernels for all of them."""
    real = [tensor for tensor in tensors if tensor.is_floating_point() and tensor.numel()]
    return torch.isfinite(nn.utils.get_total_norm(real, norm_type=math.inf))  # the largest magnitude


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
    correct = [rank_N < min(places, logits.shape[1]) for places in (1, 5)]
    counts = (torch.stack([*correct, known_N]) & known_N).sum(1, dtype=torch.float64)
    return torch.cat([loss_sum.double()[None], counts])
