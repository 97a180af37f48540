"""The argument of the single-read CUDA kernels, as ctypes lays it out."""

import ctypes

from onlinenorm.ops.fused import peers

POINTERS = ("out", "out_residual", "mask", "tile_counter", "clear", "launches", "late")
NORM = (
    "weight", "bias", "state_a", "state_b", "tables", "moments", "rzeta", "grad_weight", "grad_bias", "sample_sums",
    "tile_sums", "channel_sums",
)  # fmt: skip
SHORTCUT = "shortcut_"  # before the names of the second layer's
INTEGERS = (
    "samples", "channels", "pixels", "tile_rows", "tiles", "segments", "box_rows", "boxes", "width", "clear_count",
    "rank",
)  # fmt: skip
REALS = (
    "alpha_fwd", "one_minus_alpha_fwd", "alpha_bkw", "one_minus_alpha_bkw", "eps", "clamp", "zeta_eps", "scale",
    "patience",
)  # fmt: skip


class Params(ctypes.Structure):
    """The kernels' argument; same order as in common.cu."""

    _fields_ = (
        ("maps", ctypes.c_char * 128 * 4),
        *((name, ctypes.c_void_p) for name in POINTERS),
        ("peers", ctypes.c_void_p * peers.MOST),
        *((name, ctypes.c_void_p) for name in (*NORM, *(SHORTCUT + name for name in NORM))),
        *((name, ctypes.c_int) for name in INTEGERS),
        *((name, ctypes.c_float) for name in REALS),
        (
            "padding",
            ctypes.c_char * (-(8 * (len(POINTERS + NORM + NORM) + peers.MOST) + 4 * len(INTEGERS + REALS)) % 64),
        ),
    )
