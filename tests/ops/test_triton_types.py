"""The Triton kernels compile for a GPU on a machine without one: the interpreter does not look at types."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

# In a process where Triton compiles, which it does not where it interprets.
COMPILE = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from onlinenorm.data.resize_triton import _ROWS, _WARP, crops_kernel, weights_kernel
from onlinenorm.ops.fused.kernels import backward, forward

def show(name, kernel, types, constants, **options):
    kinds = {k: "constexpr" if k in constants else types[k] for k in kernel.arg_names}
    fixed = {(kernel.arg_names.index(k),): value for k, value in constants.items()}
    source = ASTSource(fn=kernel, signature=kinds, constexprs=fixed)
    asm = compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm
    print(name, len(asm["cubin"]), asm["ptx"].count("fma.rn.f64"))

OPTIONAL = {"extra_ptr", "out_ptr", "grad_residual_ptr", "residual_ptr", "rzeta_ptr", "kappa_ptr", "weight_ptr",
            "bias_ptr", "own_ptr"}
IMAGES = {"g_ptr", "x_ptr", "out_ptr", "y_ptr", "grad_x_ptr", "extra_ptr", "residual_ptr", "grad_residual_ptr"}
REALS = {"eps", "scale_eps", "clamp", "alpha", "rest", "k", "scale", "most_growth"}
FIXED = {"RELU": True, "CLAMP": True, "STAGES": 2, "BLOCK_N": 4, "BLOCK_P": 8, "BLOCK_C": 16}

for module in (forward, backward):
    for name in sorted(name for name in dir(module) if name.endswith("_kernel")):
        kernel = getattr(module, name)
        for everything in (True, False):
            constants = {k: FIXED[k] for k in kernel.arg_names if k.isupper()}
            if not everything:
                needed = {"project_kernel", "layer_scale_kernel"}
                absent = OPTIONAL | ({"moments_ptr"} if name == "gradient_moments_kernel" else set())
                absent -= {"rzeta_ptr", "kappa_ptr"} if name in needed else set()
                constants |= {k: None for k in kernel.arg_names if k in absent}
            types = {
                k: "*bf16" if k in IMAGES else "*fp32" if k.endswith("_ptr") else "fp32" if k in REALS else "i32"
                for k in kernel.arg_names
            }
            show("norm", kernel, types, constants)

TYPES = {"table": "*i64", "segments": "*i64", "pairs": "*i64", "columns": "*i32", "weights": "*i32",
         "pixels": "*u8", "out": "*u8", "taps": "i32", "crop_size": "i32"}
show("resize", weights_kernel, TYPES, {"BLOCK": 128}, enable_fp_fusion=False)
show("resize", crops_kernel, TYPES, {"CHANNELS": 3, "ROWS": _ROWS, "WIDTH": _WARP}, enable_fp_fusion=False)
"""


def test_triton_kernels_compile_without_a_gpu(tmp_path):
    """And those that resize multiply and add apart, as C code does whose bits they have."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    script = tmp_path / "compile_kernels.py"  # Triton reads the source of what it compiles
    script.write_text(COMPILE)
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    kernels = [line.split() for line in done.stdout.splitlines()]
    assert len(kernels) == 20 + 2 and all(int(size) for _, size, _ in kernels)
    assert [fused for name, _, fused in kernels if name == "resize"] == ["0", "0"]
