"""The Triton kernels compile for a GPU on a machine without one: the interpreter does not look at types."""

import pytest
from compiling import printed_by

pytest.importorskip("triton")

COMPILE = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from onlinenorm.ops.fused.kernels import backward, forward

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
            kinds = {
                k: "constexpr" if k in constants else "*bf16" if k in IMAGES else "*fp32" if k.endswith("_ptr")
                else "fp32" if k in REALS else "i32"
                for k in kernel.arg_names
            }
            fixed = {(kernel.arg_names.index(k),): value for k, value in constants.items()}
            source = ASTSource(fn=kernel, signature=kinds, constexprs=fixed)
            print(name, len(compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]))
"""


def test_triton_kernels_compile_without_a_gpu(tmp_path):
    assert len(printed_by(COMPILE, tmp_path)) == 16
