"""Weights and statistics that come from elsewhere: BatchNorm's files, half precision, averaged weights."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn

from onlinenorm import OnlineNorm2d, convert
from onlinenorm.normalizers import update_statistics


def batch_network(dtype=torch.float32):
    network = nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4)).to(dtype)
    for _ in range(2):
        network(torch.randn(4, 2, 3, 3, dtype=dtype) + 1)
    return network


def test_batch_norm_weights_load_into_a_converted_network_and_back():
    source, x = batch_network(), torch.randn(2, 2, 3, 3)
    online = convert(batch_network(), error_compensation="none")
    online(torch.randn(4, 2, 3, 3)).square().sum().backward()
    online.load_state_dict(source.state_dict(), strict=True)
    assert not online[1].control_u.any() and not online[1].control_v.any()
    torch.testing.assert_close(online.eval()(x), source.eval()(x))
    alone = OnlineNorm2d(4)
    alone.load_state_dict(source[1].state_dict(), strict=True)
    assert torch.equal(alone.running_var, source[1].running_var)
    saved = online.state_dict()
    target = batch_network()
    assert sorted(target.load_state_dict(saved, strict=False).unexpected_keys) == ["1.control_u", "1.control_v"]
    torch.testing.assert_close(target.eval()(x), source(x))
    batch_network().load_state_dict(convert(online, to="batch").state_dict(), strict=True)


def test_what_is_neither_stays_an_error():
    state = OnlineNorm2d(4).state_dict()
    for broken, words in (
        ({k: v for k, v in state.items() if k != "control_u"}, 'Missing.*"control_u"'),
        ({k: v for k, v in state.items() if k != "running_var"}, 'Missing.*"running_var"'),
        (state | {"num_batches_tracked": torch.tensor(3)}, 'Unexpected.*"num_batches_tracked"'),
        (nn.BatchNorm2d(4, track_running_stats=False).state_dict(), 'Missing.*"running_mean"'),
    ):
        with pytest.raises(RuntimeError, match=words):
            OnlineNorm2d(4).load_state_dict(broken)


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_half_precision_never_enters(assign, device):
    if device == "meta" and not assign:
        pytest.skip("values cannot be copied into meta tensors")
    source = nn.BatchNorm2d(4).half()
    layer = OnlineNorm2d(4, device=device)
    layer.load_state_dict(source.state_dict(), assign=assign)
    assert {t.dtype for t in layer.state_dict().values()} == {torch.float32}
    assert not any(t.is_meta for t in layer.state_dict().values())
    assert layer(torch.randn(2, 4, 3, 3).half()).dtype == torch.float16


def test_statistics_of_averaged_weights():
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.Dropout(0.0), OnlineNorm2d(3, alpha_fwd=0.9))
    averaged = AveragedModel(model)
    batches = [(torch.randn(8, 2, 3, 3) + 2, None) for _ in range(20)]
    before = copy.deepcopy(averaged.state_dict())
    update_bn(batches, averaged)
    assert all(torch.equal(v, before[k]) for k, v in averaged.state_dict().items()), "torch's now serves OnlineNorm too"
    averaged.eval()
    averaged.module[2].train()
    assert update_statistics(averaged, batches) == 1
    assert not averaged.training and averaged.module[2].training
    after = averaged.state_dict()
    assert {k for k, v in after.items() if not torch.equal(v, before[k])} == {
        "module.2.running_mean", "module.2.running_var",
    }  # fmt: skip
    seen = model[0](torch.cat([x for x, _ in batches]))
    torch.testing.assert_close(after["module.2.running_mean"], seen.mean((0, 2, 3)), rtol=0.2, atol=0.2)
    assert all(p.grad is None for p in averaged.parameters())
    with pytest.warns(UserWarning, match="no OnlineNorm layer"):
        assert update_statistics(nn.BatchNorm2d(3), batches) == 0


def test_statistics_move_under_inference_mode_too():
    model, x = nn.Sequential(nn.Conv2d(2, 3, 1), OnlineNorm2d(3)), torch.randn(8, 2, 3, 3)
    twin = copy.deepcopy(model)
    update_statistics(model, [x, x * 2])
    with torch.inference_mode():
        update_statistics(twin, [x, x * 2])  # the second is an inference tensor
    assert torch.equal(twin[1].running_mean, model[1].running_mean) and model[1].running_mean.any()


@pytest.mark.parametrize("batch", [{"image": torch.zeros(2, 3, 2, 2)}, [{}], [], None])
def test_batches_without_an_input_tensor_are_named(batch):
    layer = OnlineNorm2d(3).eval()
    with pytest.raises(ValueError, match=r"^batches: a batch is a \w+, .* give it a generator"):
        update_statistics(layer, [batch])
    assert not layer.training
