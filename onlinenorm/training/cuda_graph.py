"""Forward and backward of a training step as CUDA graphs: two replays in place of hundreds of kernel launches."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

_WARM_UPS = 3  # compilation, choice of algorithms and workspaces belong before the capture


class GraphedStep:
    """`step(module, images, labels)` -> (loss, figures), with the device's work replayed from captured graphs.

    The first batch is captured, after warm-up passes that leave no trace in the module's buffers; batches like it are
    replayed, others run as they are. Gradients reach the parameters through autograd, so that hooks, data-parallel
    wrappers and optimizers see no difference; they are the graph's own memory until the next step, so set them to None
    between steps, as Lightning does, not to zero. The memory of activations stays reserved between steps.

    Args:
        module: its parameters are trained; buffers are updated in place; on a CUDA device.
        step: (forward, images, labels) -> (loss, figures); figures do not require gradients.
        accumulates: gradients of several calls are added up before a step of the optimizer.
    """

    def __init__(self, module: nn.Module, step: Callable[..., tuple[Tensor, Tensor]], accumulates: bool):
        self.module, self.step, self.accumulates = module, step, accumulates
        self._kind: tuple | None = None

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        kind = images.shape, images.dtype, images.stride()
        if self._kind is None:
            self._capture(images, labels)
            self._kind = kind
        if kind != self._kind:
            return self.step(self.module, images, labels)
        return _Replay.apply(self, images, labels, *self._parameters)

    def _capture(self, images: Tensor, labels: Tensor) -> None:
        trained = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        self._parameters = tuple(trained.values())
        # Stand-ins that share memory: autograd ties a parameter it has met to the stream of the capture.
        stand_ins: dict[str, Tensor] = {name: nn.Parameter(p.detach()) for name, p in trained.items()}
        self.images, self.labels = images.detach().clone(), labels.clone()

        def forward(x: Tensor) -> Tensor:
            return functional_call(self.module, stand_ins, (x,))

        def gradients(loss: Tensor) -> tuple[Tensor, ...]:
            return torch.autograd.grad(loss, tuple(stand_ins.values()), self.grad_loss)

        buffers = {name: buffer.clone() for name, buffer in self.module.named_buffers()}
        self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream(images.device)
        stream.wait_stream(torch.cuda.current_stream(images.device))
        # weights cast by autocast are cast again in every replay, not once and kept
        dtype, enabled = torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda")
        with torch.autocast("cuda", dtype, enabled, cache_enabled=False):
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UPS):
                    loss, _ = self.step(forward, self.images, self.labels)
                    self.grad_loss = torch.ones_like(loss)
                    gradients(loss)
                del loss
            torch.cuda.current_stream(images.device).wait_stream(stream)
            # other threads go on: loaders pin memory and decode, NCCL watches its work
            capture = functools.partial(torch.cuda.graph, stream=stream, capture_error_mode="thread_local")
            with capture(self._forward):
                loss, figures = self.step(forward, self.images, self.labels)
            with capture(self._backward, pool=self._forward.pool()):
                captured = gradients(loss)
        self._outputs, self._gradients = (loss.detach(), figures), captured
        with torch.no_grad():
            for name, buffer in self.module.named_buffers():
                buffer.copy_(buffers[name])

    def replay_forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        self.images.copy_(images)
        self.labels.copy_(labels)
        self._forward.replay()
        loss, figures = self._outputs
        return loss.clone(), figures.clone()

    def replay_backward(self, grad_loss: Tensor) -> tuple[Tensor, ...]:
        self.grad_loss.copy_(grad_loss)
        self._backward.replay()
        # where they are added up, the next replay must not write over them
        return tuple(g.clone() if self.accumulates else g.detach() for g in self._gradients)


class _Replay(torch.autograd.Function):
    """The replays as one operation on the parameters."""

    @staticmethod
    def forward(ctx, graphed: GraphedStep, images: Tensor, labels: Tensor, *parameters: Tensor):
        ctx.graphed = graphed
        loss, figures = graphed.replay_forward(images, labels)
        ctx.mark_non_differentiable(figures)
        return loss, figures

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss: Tensor, _):
        return None, None, None, *ctx.graphed.replay_backward(grad_loss)
