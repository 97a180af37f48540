"""The run-time compiler and the driver that single-read CUDA kernels are started through, without a GPU."""

import ctypes
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from onlinenorm.ops.fused import nvrtc, single_read


@pytest.mark.parametrize(
    ("capability", "known", "target"),
    [
        ((9, 0), [80, 90, 100], "sm_90"),
        ((10, 3), [90, 100, 120], "sm_100"),  # code of an older minor version runs on a newer one
        ((10, 0), [90, 103], None),
        ((12, 1), [100, 120, 121], "sm_121"),
    ],
)
def test_the_target_is_the_newest_that_device_and_compiler_know(capability, known, target, monkeypatch):
    class Compiler:
        def nvrtcGetNumSupportedArchs(self, count):
            count._obj.value = len(known)

        def nvrtcGetSupportedArchs(self, archs):
            archs[:] = known

    monkeypatch.setattr(nvrtc, "_nvrtc", Compiler)
    assert nvrtc.architecture(*capability) == target


def test_the_compiler_that_comes_with_torch_knows_hopper(monkeypatch):
    if torch.version.cuda is None:
        pytest.skip("torch without CUDA carries no NVRTC")
    assert nvrtc.architecture(9, 0) == "sm_90" and nvrtc.architecture(19, 9) is None

    def missing():
        raise RuntimeError("libnvrtc not found")

    monkeypatch.setattr(nvrtc, "_nvrtc", missing)
    assert nvrtc.architecture(9, 0) is None


@pytest.mark.parametrize("cooperative", [True, False])
def test_a_kernel_begins_when_all_can_run_at_once_or_ahead_of_the_end_of_the_one_before(cooperative, monkeypatch):
    launched = []

    def launch(config, function, arguments, extra):
        attribute = config._obj.attributes[0]
        launched.append((list(config._obj.shape), config._obj.stream, config._obj.count, attribute.id, attribute.value))
        launched.append(single_read.Params.from_address(arguments[0]).samples)
        return 0

    driver = SimpleNamespace(cuModuleLoadData=lambda *_: 0, cuModuleGetFunction=lambda *_: 0, cuLaunchKernelEx=launch)
    driver.cuGraphAddDependencies_v2 = None  # as of CUDA 12.3
    monkeypatch.setattr(nvrtc, "_driver", lambda: driver)
    monkeypatch.setattr(nvrtc.Kernel, "starts_early", True)
    params = single_read.Params(samples=7)
    nvrtc.Kernel(b"", "online_norm_forward").launch(24, 544, 1000, 99, params, cooperative)
    assert launched == [([24, 1, 1, 544, 1, 1, 1000], 99, 1, 2 if cooperative else 6, 1), 7]
    assert (ctypes.sizeof(nvrtc._Attribute), ctypes.sizeof(nvrtc._Config)) == (72, 56)  # as in cuda.h


class ThreadWithoutContext:
    """A driver that refuses to work until the calling thread has been given a context."""

    def __init__(self, device):
        self.device, self.current = device, None

    def cuDeviceGet(self, device, index):
        device._obj.value = 40 + index
        return 0

    def cuDevicePrimaryCtxRetain(self, context, device):
        context._obj.value = 1000 + device.value
        return 0

    def cuCtxSetCurrent(self, context):
        self.current = context.value
        return 0

    def cuModuleLoadData(self, module, code):
        return 0 if self.current == 1040 + self.device else 201

    def cuModuleGetFunction(self, function, module, name):
        return 0 if name == b"online_norm" else 500

    def cuGetErrorString(self, status, text):
        text._obj.value = b"named symbol not found"
        return 0


@pytest.mark.parametrize("device", [0, 3])
def test_a_thread_without_a_context_gets_that_of_torchs_device(device, monkeypatch):
    fake = ThreadWithoutContext(device)
    monkeypatch.setattr(nvrtc, "_driver", lambda: fake)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: device)
    nvrtc.Kernel(b"", "online_norm")
    with pytest.raises(RuntimeError, match="error 500 of cuModuleGetFunction: named symbol not found"):
        nvrtc.Kernel(b"", "missing")
