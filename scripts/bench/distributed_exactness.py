"""The networks of the benchmark of several processes, and how far these are from one process."""

import copy
import sys
import warnings
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from onlinenorm import OnlineNorm2d, models
from onlinenorm.normalizers import synchronise_batch_norm
from scripts.bench.distributed_batch_norm import TracedSyncBatchNorm2d

_layer_scaling = partial(OnlineNorm2d, error_compensation="layer_scaling")
NORMALIZERS = {
    "batch": nn.BatchNorm2d,
    "sync_batch": nn.BatchNorm2d,
    "sync_batch_traced": TracedSyncBatchNorm2d,
    "online_local": partial(OnlineNorm2d, statistics="local"),
    "online_local_layer_scaling": partial(_layer_scaling, statistics="local"),
    "online_global": partial(OnlineNorm2d, exchange="gather"),
    "online_global_layer_scaling": partial(_layer_scaling, exchange="gather"),
    "online_peers": partial(OnlineNorm2d, exchange="auto"),
    "online_peers_layer_scaling": partial(_layer_scaling, exchange="auto"),
}
# what each is on one process
ALONE = {name: name.replace("global", "local").replace("peers", "local") for name in NORMALIZERS}
ALONE |= {"sync_batch": "batch", "sync_batch_traced": "batch"}
CHECKED = ("sync_batch", "sync_batch_traced", "online_global", "online_global_layer_scaling")
CHECKED_16_BITS = ("online_global", "online_peers", "online_peers_layer_scaling")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def build(name: str, model: str, device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    network = getattr(models, model)(NORMALIZERS[name]).to(device, memory_format=torch.channels_last)
    if name == "sync_batch" and device.type == "cuda":
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    elif name == "sync_batch":
        network = synchronise_batch_norm(network)
    return network.train()


def parallel(model: nn.Module, device: torch.device) -> nn.Module:
    ids = [device] if device.type == "cuda" else None
    # newer torch deprecates the key before its successor leaves each process its own statistics
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
    return DistributedDataParallel(model, ids, broadcast_buffers=False, gradient_as_bucket_view=True)


def trained(model: nn.Module, batches, steps: int, lr: float, dtype: torch.dtype) -> list[float]:
    """SGD over batches of (images, labels), under autocast where ``dtype`` is bfloat16; the losses."""
    sgd = torch.optim.SGD(model.parameters(), lr, momentum=0.9)
    losses = []
    for images, labels in batches[:steps]:
        sgd.zero_grad()
        with torch.autocast(images.device.type, torch.bfloat16, enabled=dtype is torch.bfloat16):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        sgd.step()
        losses.append(loss.item())
    return losses


class Alone:
    """Context in which layers of this process see no process group: what one process computes."""

    def __enter__(self):
        self.found = dist.is_initialized, dist.get_world_size
        dist.is_initialized, dist.get_world_size = (lambda: False), (lambda *_: 1)

    def __exit__(self, *_):
        dist.is_initialized, dist.get_world_size = self.found


def exactness(name: str, args, device: torch.device, model_name: str, dtype: torch.dtype = torch.float32) -> dict:
    """How far losses, parameters and statistics of all processes are from those of one."""
    rank, world = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(1)
    batch = args.check_batch * world
    images = torch.randn(args.check_steps, batch, 3, 32, 32, generator=generator) + 1
    labels = torch.randint(10, (args.check_steps, batch), generator=generator)
    images, labels = images.to(device), labels.to(device)
    whole = [(x.to(memory_format=torch.channels_last), t) for x, t in zip(images, labels, strict=True)]
    own = [(x[rank::world].contiguous(memory_format=torch.channels_last), t[rank::world]) for x, t in whole]
    model = build(name, model_name, device)
    one = copy.deepcopy(model)
    how = args.check_steps, args.check_lr, dtype
    several = torch.tensor(trained(parallel(model, device), own, *how), device=device)
    dist.all_reduce(several)
    several /= world
    with Alone():
        single = torch.tensor(trained(one, whole, *how), device=device)
    found = {key: value for key, value in model.state_dict().items() if value.is_floating_point()}
    parameters = {key for key, _ in one.named_parameters()}

    def far(keys) -> float:
        pairs = [(found[key].flatten().double(), one.state_dict()[key].flatten().double()) for key in keys]
        ours, truth = (torch.cat(side) for side in zip(*pairs, strict=True))
        return float((ours - truth).norm() / truth.norm())

    same = torch.cat([value.flatten().double() for value in found.values()])
    others = [torch.empty_like(same) for _ in range(world)]
    dist.all_gather(others, same)
    return {
        "normalizer": name,
        "steps": args.check_steps,
        "largest_loss_difference": float((several - single).abs().max()),
        "parameter_difference": far(parameters),
        "statistic_difference": far(found.keys() - parameters),
        "ranks_identical": all(torch.equal(other, same) for other in others),
    }
