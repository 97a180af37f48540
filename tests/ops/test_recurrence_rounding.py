"""The recurrences of the CUDA kernels leave a compiler no choice of what is rounded: another process may not share it.

Each process advances the state over all samples, and the same sample is met at one inlined place or another. Where a
product meets a sum, a compiler may round both together or not, at each place by its own lights; so the sources say it.
"""

import ctypes
import shutil
import subprocess

import pytest
import torch

pytest.importorskip("triton")

from onlinenorm.ops.fused import single_read

HOST = r"""
#include <cmath>
#define __device__
#define __forceinline__
#define INFINITE INFINITY
typedef unsigned long long u64;
struct float2 { float x, y; };
struct Params { float alpha_fwd, one_minus_alpha_fwd, alpha_bkw, one_minus_alpha_bkw, eps, zeta_eps, scale; };
static float2 make_float2(float x, float y) { return {x, y}; }
static float rsqrtf(float x) { return 1.f / sqrtf(x); }
static bool is_own(const Params&, int) { return true; }
static float2 message;
static float2 sums_in(u64) { return message; }
static float channels_sum;
struct Norm {};
static float wait_for_channel_sums(const Params&, const Norm&, int, int) { return channels_sum; }
%(step_over)s
extern "C" void run(const float* in, int samples, float* out) {
    const Params p{0.97f, 0.03f, 0.93f, 0.07f, 1e-5f, 1e-6f, 1.7f};
    const int at = 0;
    const float weight = 0.83f, bias = 0.21f, own_bias = bias, per_pixels = 1.f / 49, per_channels = 1.f / 192;
    float mean = 0.1f, var = 0.9f, u = 0.2f, v = 0.3f, grad_weight = 0.f, grad_bias = 0.f;
    %(row_of)s
    %(step)s
    %(square_of)s
    %(rzeta_of)s
    for (int n = 0; n < samples; n++, in += 4, out += 6) {
        const float2 before{mean, var};
        message = make_float2(in[0], in[1] * in[1]);
        out[0] = square_of(0);  // which moves mean and var
        channels_sum = 192 * (0.5f + out[0]);
        out[1] = rzeta_of(Norm(), n);
        float row[6];
        row_of(before, message, make_float2(in[2], in[3]), out[1], 0.01f * in[3], row);
        step(n, row);
        out[2] = mean, out[3] = var, out[4] = u, out[5] = v;
    }
}
"""


def definition(direction, name):
    """The text of a function or lambda of a kernel."""
    source = single_read.source_of(direction)
    (begin,) = {source.find(start) for start in (f"auto {name} = ", f"__device__ __forceinline__ void {name}(")} - {-1}
    end = source.index("{", begin)
    depth, end = 1, end + 1
    while depth:
        depth += {"{": 1, "}": -1}.get(source[end], 0)
        end += 1
    return source[begin:end] + ";"


def run(folder, scaled, contraction, inputs):
    names = {"step_over": "forward", "square_of": "forward", "rzeta_of": "forward"}
    names |= {"row_of": "backward", "step": "backward"}
    source, library = folder / "recurrence.cpp", folder / f"{scaled}{contraction}.so"
    source.write_text(HOST % {name: definition(direction, name) for name, direction in names.items()})
    flags = f"-std=c++17 -O2 -march=native -shared -fPIC -ffp-contract={contraction} -DSCALED={scaled}"
    subprocess.run(["g++", *flags.split(), str(source), "-o", str(library)], check=True)
    found = torch.empty(len(inputs), 6)
    ctypes.CDLL(str(library)).run(ctypes.c_void_p(inputs.data_ptr()), len(inputs), ctypes.c_void_p(found.data_ptr()))
    return found


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a compiler")
@pytest.mark.parametrize("scaled", [0, 1])
def test_products_and_sums_are_rounded_as_the_source_says(scaled, tmp_path):
    inputs = torch.randn((300, 4), generator=torch.Generator().manual_seed(0))
    off, fast = (run(tmp_path, scaled, contraction, inputs) for contraction in ("off", "fast"))
    assert torch.isfinite(off).all()
    columns = ("mean square", "1 / zeta", "running_mean", "running_var", "control_u", "control_v")
    assert [name for name, a, b in zip(columns, off.T, fast.T, strict=True) if not torch.equal(a, b)] == []
