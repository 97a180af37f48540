"""Steps of training and validation as CUDA graphs: a few replays in place of hundreds of kernel launches."""

import atexit
import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer

from onlinenorm.errors import RunError
from onlinenorm.hooks import are_untouched
from onlinenorm.models.blocks import BasicBlock, Bottleneck, BottleneckStride1x1

SAYS_SO = "layers_alone_read_weights"
_WARM_UPS = 3  # compilation, choice of algorithms and workspaces belong before the capture
_graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()


def warm_up(function: Callable[[], Any], device: torch.device) -> torch.cuda.Stream:
    """Runs what will be captured a few times; returns the stream to capture it on."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UPS):
            function()
    torch.cuda.current_stream(device).wait_stream(stream)
    return stream


def capture(
    function: Callable[[], Any], stream: torch.cuda.Stream, pool: Any = None
) -> tuple[torch.cuda.CUDAGraph, Any]:
    """The graph of what `function` does, which is not done yet, and its result: memory that each replay writes."""
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    _graphs.add(graph)
    # At exit ahead of what was registered before: a process group's end waits for the graphs that hold its collectives.
    atexit.unregister(_reset_graphs)
    atexit.register(_reset_graphs)
    # other threads go on: loaders pin memory and decode, NCCL watches its work
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        result = function()
    if find_spec("triton"):  # which comes with the package of the kernels; not on every platform
        from onlinenorm.ops.fused.memset_nodes import as_kernels

        with torch.cuda.device(stream.device):
            as_kernels(graph)
    graph.instantiate()
    return graph, result


def _reset_graphs() -> None:
    for graph in _graphs:  # those that an error's traceback still holds
        graph.reset()


def kind_of(*inputs: Tensor) -> list[tuple]:
    """What inputs must have in common with those of a capture to be replayed."""
    return [(tensor.shape, tensor.dtype, tensor.stride()) for tensor in inputs]


@contextlib.contextmanager
def undone(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Context after which the tensors hold again what they held before."""
    kept = [(tensor, tensor.clone()) for tensor in tensors]
    yield
    with torch.no_grad():
        for tensor, value in kept:
            tensor.copy_(value)


def copy_together(to: Sequence[Tensor], of: Sequence[Tensor]) -> None:
    """`to[i].copy_(of[i])` in a few kernels for all.

    torch has such kernels for lists whose tensors are of one dtype each and laid out in pairs alike; if a single one is
    not, every tensor is copied by a kernel of its own.
    """
    kinds: dict[tuple, tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in zip(to, of, strict=True):
        strides = zip(target.shape, target.stride(), source.stride(), strict=True)
        if alike := all(size == 1 or a == b for size, a, b in strides):  # where there is one element, any stride does
            source = source.as_strided(target.shape, target.stride())
        targets, sources = kinds.setdefault((alike, target.dtype, source.dtype), ([], []))
        targets.append(target)
        sources.append(source)
    for targets, sources in kinds.values():
        torch._foreach_copy_(targets, sources)


def like(parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
    """The gradients in the dtypes and strides of the parameters, which autograd would see to."""
    result = list(gradients)
    pairs = enumerate(zip(parameters, gradients, strict=True))
    others = [place for place, (p, g) in pairs if (g.dtype, g.stride()) != (p.dtype, p.stride())]
    for place in others:
        result[place] = torch.empty_like(parameters[place])
    copy_together([result[place] for place in others], [gradients[place] for place in others])
    return result


def averaged(parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
    """Means of the gradients over all processes as `like` the parameters; a collective a dtype."""
    means = list(gradients)
    for dtype in dict.fromkeys(parameter.dtype for parameter in parameters):
        places = [place for place, parameter in enumerate(parameters) if parameter.dtype == dtype]
        own = [parameters[place] for place in places]
        sizes = [parameter.numel() for parameter in own]
        flat = torch.empty(sum(sizes), dtype=dtype, device=own[0].device)
        strides = (torch.empty_like(parameter).stride() for parameter in own)  # its own where it is dense
        pairs = zip(flat.split(sizes), own, strides, strict=True)
        parts = [part.as_strided(parameter.shape, stride) for part, parameter, stride in pairs]
        copy_together(parts, [gradients[place] for place in places])
        dist.all_reduce(flat, dist.ReduceOp.AVG)
        for place, part in zip(places, parts, strict=True):
            means[place] = part
    return means


def weights_cast_by_layers(module: nn.Module) -> set[str]:
    """Names of the parameters that autocast casts once a pass each: weights and biases of the convolutions and linear
    layers of networks that say so (`layers_alone_read_weights`, of their own class: a subclass may read them); not
    those that several layers share, that lie in a normalizer or another's block, or where a hook may read them."""
    owners = Counter(id(parameter) for _, parameter in module.named_parameters(remove_duplicate=False))
    return {
        f"{layer_name}.{name}".lstrip(".")
        for network_name, network in module.named_modules()
        if vars(network).get(SAYS_SO, vars(type(network)).get(SAYS_SO, False)) and are_untouched(*network.modules())
        for layer_name, layer in _own_layers(network, network_name)
        for name, parameter in layer.named_parameters(recurse=False)
        if name in ("weight", "bias") and owners[id(parameter)] == 1
    }


def _own_layers(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """Convolutions and linear layers, by name, of a network and of those of its blocks that leave them alone."""
    for name, child in module.named_children():
        if type(child) in (nn.Conv2d, nn.Linear):
            yield f"{path}.{name}", child
        elif type(child) in (nn.Sequential, BasicBlock, Bottleneck, BottleneckStride1x1):
            yield from _own_layers(child, f"{path}.{name}")


class CastWeights:
    """Copies of the `weights_cast_by_layers` of a module, in autocast's dtype where it is on, for a pass to be given.

    Args:
        module: what is trained.
        parameters: those of it that are, by name.
        kind: of device.
    """

    enabled = True  # else autocast casts them

    def __init__(self, module: nn.Module, parameters: Mapping[str, Tensor], kind: str):
        together = self.enabled and torch.is_autocast_enabled(kind)
        names = weights_cast_by_layers(module) if together else set()
        cast = {name: p for name, p in parameters.items() if name in names and p.dtype is torch.float32}
        self._of = list(cast.values())
        dtype = torch.get_autocast_dtype(kind)
        self.copies = {name: nn.Parameter(parameter.detach().to(dtype)) for name, parameter in cast.items()}

    @torch.no_grad()
    def refresh(self) -> None:
        """The copies take the values that the weights have now."""
        copy_together(list(self.copies.values()), self._of)


class GraphedEvaluation:
    """`function(*inputs)`, which adds to tensors in place, replayed from a captured graph.

    The first inputs are captured; inputs like them are replayed, others run as they are. What a replay returns is the
    graph's own memory until the next.

    Args:
        function: of tensors on a CUDA device; returns a tensor.
        state: what it changes, which the capture leaves as it was.
        pool: memory of another graph, which is never replayed at the same time, or None.
    """

    def __init__(self, function: Callable[..., Tensor], state: Iterable[Tensor], pool: Any = None):
        self.function, self.state, self.pool = function, tuple(state), pool
        self._kind: list[tuple] | None = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        if self._kind is None:
            self._kind = kind_of(*inputs)
            self._inputs = [tensor.clone() for tensor in inputs]

            def evaluate() -> list[Tensor]:
                return [self.function(*self._inputs)]

            with undone(self.state):
                self._graph, self._result = capture(evaluate, warm_up(evaluate, inputs[0].device), self.pool)
        if kind_of(*inputs) != self._kind:
            return self.function(*inputs)
        for memory, value in zip(self._inputs, inputs, strict=True):
            memory.copy_(value)
        self._graph.replay()
        return self._result[0]


class GraphedStep:
    """`step(module, images, labels)` -> loss, with the device's work replayed from captured graphs.

    The first batch is captured, after warm-up passes that leave no trace in the module's buffers and in `state`;
    batches like it are replayed, others run as they are. The memory of activations stays reserved between steps.

    With an optimizer the loss has no gradient function: `backward` replays the gradients, `step_optimizer` the step,
    and the parameters' `grad` stays None. Gradients are averaged over processes within the graph, where wrappers like
    DistributedDataParallel see none to reduce: by one collective behind the pass, as a compiled network has them all at
    once, and as a collective beside kernels that wait for other processes could take the room that these wait for.

    Without one, gradients reach the parameters through autograd, so that data-parallel wrappers, loss scalers and
    optimizers see no difference; they are the graph's own memory until the next step, so set them to None between
    steps, as Lightning does, not to zero.

    Under autocast the weights of `weights_cast_by_layers` are cast in a few kernels for all, and so are their
    gradients, where autocast has two for every layer: the same values.

    Args:
        module: its parameters are trained; buffers are updated in place; on a CUDA device.
        step: (forward, images, labels) -> loss.
        state: other tensors that `step` updates in place.
        optimizer: of all parameters that are trained; its step must launch the same kernels each time.
        accumulates: without an optimizer: gradients of several calls are added up before a step of it.
        averages: with an optimizer: gradients are means over all processes, each of which makes the same calls.
    """

    def __init__(
        self,
        module: nn.Module,
        step: Callable[..., Tensor],
        state: Iterable[Tensor] = (),
        optimizer: Optimizer | None = None,
        accumulates: bool = False,
        averages: bool = False,
    ):
        self.module, self.step, self.state = module, step, tuple(state)
        self.optimizer, self.accumulates, self.averages = optimizer, accumulates, averages
        self._kind: list[tuple] | None = None
        self._replayed = False  # the last call
        self._optimizer_step: torch.cuda.CUDAGraph
        # settings of the optimizer: when its step was captured, and at the last step
        self._captured: list[dict] | None = None
        self._last: list[dict] | None = None

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        if self._kind is None:
            with undone((*self.module.buffers(), *self.state)):
                self._capture(images, labels)
            self._kind = kind_of(images, labels)
        if any(parameter.requires_grad != trained for parameter, trained in self._all):
            raise RunError(
                "a parameter was frozen or unfrozen after the training step had been captured as a CUDA graph, which "
                "goes on training those of that time; do it before the first step, or train without a graph "
                "(trainer.cuda_graph=false)"
            )
        self._replayed = kind_of(images, labels) == self._kind
        if not self._replayed:
            return self.step(self.module, images, labels)
        self.images.copy_(images)
        self.labels.copy_(labels)
        return self.replay_forward() if self.optimizer else _Replay.apply(self, *self._parameters)

    def _capture(self, images: Tensor, labels: Tensor) -> None:
        trained = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        self._parameters = tuple(trained.values())
        self._all = [(parameter, parameter.requires_grad) for parameter in self.module.parameters()]
        # Stand-ins that share memory: autograd ties a parameter it has met to the stream of the capture.
        stand_ins: dict[str, Tensor] = {name: nn.Parameter(p.detach()) for name, p in trained.items()}
        kind = images.device.type
        self._cast = cast = CastWeights(self.module, trained, kind)  # kept: graphs write and read its copies
        stand_ins |= cast.copies
        self.images, self.labels = images.detach().clone(), labels.clone()

        def network(x: Tensor) -> Tensor:
            return functional_call(self.module, stand_ins, (x,))

        def forward() -> None:
            cast.refresh()
            # weights cast by autocast are cast again in every replay, not once and kept
            enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
            with torch.autocast(kind, dtype, enabled, cache_enabled=False):
                self._loss = self.step(network, self.images, self.labels)

        def backward() -> list[Tensor]:
            with torch.autocast(kind, enabled=False):  # as outside of graphs
                return self._differentiate(self._loss, tuple(stand_ins.values()), self.grad_loss)

        def both() -> None:
            forward()
            self.grad_loss = torch.ones_like(self._loss)
            backward()

        self._stream = warm_up(both, images.device)
        self._forward, _ = capture(forward, self._stream)
        self._backward, self._gradients = capture(backward, self._stream, self._forward.pool())
        self._loss = self._loss.detach()

    def _differentiate(self, loss: Tensor, parameters: tuple[Tensor, ...], grad_loss: Tensor | None) -> list[Tensor]:
        gradients = torch.autograd.grad(loss, parameters, grad_loss)
        return (averaged if self.averages else like)(self._parameters, gradients)

    @property
    def pool(self) -> Any:
        """Memory of the graphs, of which losses and gradients alone outlive a step; None before there are graphs."""
        return None if self._kind is None else self._forward.pool()

    def replay_forward(self) -> Tensor:
        self._forward.replay()
        return self._loss.detach().clone()

    def replay_backward(self, grad_loss: Tensor) -> tuple[Tensor, ...]:
        self.grad_loss.copy_(grad_loss)
        self._backward.replay()
        # where they are added up, the next replay must not write over them
        return tuple(g.clone() if self.accumulates else g.detach() for g in self._gradients)

    def backward(self, loss: Tensor) -> None:
        """The gradients of the loss that the last call returned."""
        if self._replayed:
            self._backward.replay()
            return
        gradients = self._differentiate(loss, self._parameters, None)
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient

    def step_optimizer(self) -> None:
        """A step of the optimizer after `backward`; captured, and captured anew, once its settings rest for a step.

        A learning rate of every step's own is not captured: a graph would have to read it from a tensor, which kernels
        take in float32 only, and the bits would not be those of the optimizer's own steps.
        """
        assert self.optimizer is not None
        groups = self.optimizer.param_groups
        settings = [{key: value for key, value in group.items() if key != "params"} for group in groups]
        if not self._replayed:
            self.optimizer.step()
        elif settings == self._captured:
            self._optimizer_step.replay()
        else:
            for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
                parameter.grad = gradient
            if settings == self._last:
                self._optimizer_step, _ = capture(self.optimizer.step, self._stream, self._forward.pool())
                self._optimizer_step.replay()
                self._captured = settings
            else:  # also the first step, which makes the optimizer's state
                self.optimizer.step()
            self.optimizer.zero_grad()
        self._last = settings


class _Replay(torch.autograd.Function):
    """The replays of forward and backward as one operation on the parameters."""

    @staticmethod
    def forward(ctx, graphed: GraphedStep, *parameters: Tensor):
        ctx.graphed = graphed
        return graphed.replay_forward()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss: Tensor):
        return None, *ctx.graphed.replay_backward(grad_loss)
