"""Counter-based random numbers: a value is a pure function of (seed, stream, counters), so there is no state to keep.

The generator chains the finaliser of SplitMix64 (Steele, Lea, Flood 2014) over the counters. For a fixed prefix each
step is a bijection of 64-bit words, so distinct indices never collide within one (seed, epoch).
"""

from collections.abc import Sequence

import numpy as np
import torch

ORDER, AUGMENTATION, CONTENT = 1, 2, 3  # streams: numbers drawn for one purpose never depend on another's

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MASK = (1 << 64) - 1


def _word(value: int | np.ndarray) -> np.ndarray:
    # arrays, never scalars: numpy wraps arrays silently and warns on scalar overflow
    if isinstance(value, np.ndarray):
        return value.astype(np.uint64)
    return np.array([value & _MASK], dtype=np.uint64)


def _mix(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def hash64(seed: int, stream: int, *counters: int | np.ndarray) -> np.ndarray:
    """64 random bits for every combination of the counters, which broadcast like numpy arrays (at least 1-D)."""
    h = _mix(_word(seed) + _GOLDEN)
    for counter in (stream, *counters):
        h = _mix((h ^ _word(counter)) + _GOLDEN)
    return h


def uniforms(
    seed: int, epochs: int | np.ndarray, indices: np.ndarray, count: int, columns: Sequence[int] | None = None
) -> np.ndarray:
    """`count` numbers in [0, 1) for the augmentation of each image: float64, len(indices) x count.

    Where only some `columns` are wanted, the others are 0.
    """
    epochs_N1 = epochs[:, None] if isinstance(epochs, np.ndarray) else epochs
    wanted_K = np.arange(count) if columns is None else np.array(columns, dtype=np.int64)
    bits_NK = hash64(seed, AUGMENTATION, epochs_N1, indices[:, None], wanted_K)
    numbers_NK = np.zeros((len(indices), count))
    numbers_NK[:, wanted_K] = (bits_NK >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return numbers_NK


def normals(uniforms_N2K: np.ndarray) -> np.ndarray:
    """K standard normal numbers from 2K uniform ones, by the transform of Box and Muller."""
    half = uniforms_N2K.shape[1] // 2
    radius = np.sqrt(-2.0 * np.log1p(-uniforms_N2K[:, :half]))
    return radius * np.cos(2.0 * np.pi * uniforms_N2K[:, half:])


def permutation(seed: int, epoch: int, length: int) -> np.ndarray:
    """The order in which epoch `epoch` visits the `length` training images: a function of (seed, epoch) alone.

    Sorting hashed indices, no two of which are equal, keeps the order the same across versions of libraries, as no
    library's own shuffle would. torch sorts ImageNet's three times as fast as numpy.
    """
    hashed = hash64(seed, ORDER, epoch, np.arange(length)) ^ np.uint64(1 << 63)  # in the order of signed numbers
    return torch.from_numpy(hashed.view(np.int64)).argsort().numpy()
