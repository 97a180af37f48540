"""How single-read kernels are cut: tunings by shape, tiles of rows, and the shared memory that both take."""

import functools
from dataclasses import dataclass

WIDTH = 64  # channels a slab, as in common.cu
BOX_ROWS = 256  # the most that TMA takes at once


@dataclass(frozen=True)
class Tuning:
    """How a kernel is compiled and cut: threads of a CTA's reduce warps (and as many of its write warps), stages of the
    ring, samples that write warps advance over at once, and the most rows of a tile (the ring may allow fewer)."""

    group: int
    stages: int
    chunk: int
    rows: int

    @property
    def defines(self) -> dict[str, int]:
        return {"GROUP": self.group, "STAGES": self.stages, "CHUNK": self.chunk}

    @property
    def threads(self) -> int:
        """Of the reduce warps, the write warps, and the load warp."""
        return 2 * self.group + 32


# Chosen on an H100 at the norm sites of ResNet-50, batches 32 and 256; what each loses to the fastest tuning that was
# measured stands in results/bench_kernels.md:
# (direction, layer scaling, residual or second gradient, rows N * H * W from, pixels H * W from, tuning); the first
# match counts.
TUNINGS = (
    ("forward", False, False, 0, 3136, Tuning(256, stages=4, chunk=16, rows=400)),
    ("forward", False, False, 0, 0, Tuning(256, stages=3, chunk=32, rows=400)),
    ("forward", False, True, 200_000, 0, Tuning(128, stages=3, chunk=16, rows=400)),
    ("forward", False, True, 0, 0, Tuning(256, stages=3, chunk=16, rows=400)),
    ("forward", True, False, 0, 0, Tuning(256, stages=4, chunk=16, rows=400)),
    ("forward", True, True, 50_000, 0, Tuning(128, stages=4, chunk=16, rows=400)),
    ("forward", True, True, 0, 0, Tuning(256, stages=4, chunk=16, rows=400)),
    ("backward", False, False, 0, 784, Tuning(256, stages=2, chunk=8, rows=400)),
    ("backward", False, False, 0, 0, Tuning(256, stages=3, chunk=16, rows=400)),
    ("backward", False, True, 0, 196, Tuning(128, stages=2, chunk=8, rows=400)),
    ("backward", False, True, 0, 0, Tuning(256, stages=2, chunk=16, rows=400)),
    ("backward", True, False, 0, 0, Tuning(256, stages=2, chunk=8, rows=400)),
    ("backward", True, True, 0, 784, Tuning(128, stages=4, chunk=8, rows=400)),
    ("backward", True, True, 0, 196, Tuning(128, stages=2, chunk=8, rows=400)),
    ("backward", True, True, 0, 0, Tuning(256, stages=2, chunk=8, rows=400)),
)
POOLED_TUNINGS = {  # with a max-pool: (direction, layer scaling)
    ("forward", False): Tuning(256, stages=2, chunk=16, rows=672),
    ("forward", True): Tuning(256, stages=2, chunk=16, rows=672),
    ("backward", False): Tuning(128, stages=2, chunk=8, rows=448),
    ("backward", True): Tuning(128, stages=2, chunk=8, rows=448),
}


# With a shortcut's norm: (direction, layer scaling, rows from, pixels from, tuning), chosen likewise on an H200 from
# what scripts/bench/shortcut.py measures; None where two kernels, one of each layer, are as fast. Backward of 28 x 28
# pixels and more takes at batch 32 what is fastest at batch 256.
SHORTCUT_TUNINGS = (
    ("forward", False, 200_000, 3136, Tuning(128, stages=2, chunk=4, rows=400)),
    ("forward", False, 0, 196, Tuning(128, stages=2, chunk=8, rows=400)),
    ("forward", False, 0, 0, Tuning(128, stages=3, chunk=8, rows=400)),
    ("forward", True, 200_000, 3136, Tuning(128, stages=3, chunk=4, rows=400)),
    ("forward", True, 0, 784, Tuning(128, stages=3, chunk=8, rows=400)),
    ("forward", True, 20_000, 196, Tuning(128, stages=2, chunk=4, rows=400)),
    ("forward", True, 0, 196, Tuning(128, stages=2, chunk=8, rows=400)),
    ("forward", True, 0, 0, Tuning(128, stages=4, chunk=8, rows=400)),
    ("backward", False, 0, 784, Tuning(128, stages=2, chunk=4, rows=400)),
    ("backward", False, 20_000, 196, Tuning(128, stages=2, chunk=4, rows=400)),
    ("backward", False, 0, 196, None),
    ("backward", False, 6_000, 0, Tuning(128, stages=3, chunk=4, rows=400)),
    ("backward", False, 0, 0, Tuning(128, stages=3, chunk=8, rows=400)),
    ("backward", True, 0, 784, Tuning(128, stages=2, chunk=4, rows=400)),
    ("backward", True, 20_000, 196, Tuning(128, stages=2, chunk=4, rows=400)),
    ("backward", True, 0, 196, None),
    ("backward", True, 6_000, 0, None),
    ("backward", True, 0, 0, Tuning(128, stages=2, chunk=8, rows=400)),
)


@functools.cache
def tuning_for(direction: str, scaled: bool, residual: bool, samples: int, pixels: int) -> Tuning:
    """Row of TUNINGS for a tensor of ``samples`` images of ``pixels``."""
    for *key, rows, least, tuning in TUNINGS:
        if key == [direction, scaled, residual] and samples * pixels >= rows and pixels >= least:
            return tuning
    raise AssertionError(f"TUNINGS has no row for {direction}, {scaled}, {residual}")


def shortcut_tuning_for(direction: str, scaled: bool, samples: int, pixels: int) -> Tuning | None:
    """Row of SHORTCUT_TUNINGS; None: the layers run in a kernel each.

    Not cached: torch.compile traces it, and warns of caches.
    """
    for *key, rows, least, tuning in SHORTCUT_TUNINGS:
        if key == [direction, scaled] and samples * pixels >= rows and pixels >= least:
            return tuning
    return None


def possible_tunings(direction: str, scaled: bool, flags: tuple[str, ...], pixels: int) -> list[Tuning]:
    """All that the tables give for images of ``pixels``, whatever their number; no launch of theirs: none."""
    key, table = [direction, scaled], TUNINGS if "SHORTCUT" not in flags else SHORTCUT_TUNINGS
    if table is TUNINGS:
        key.append("RESIDUAL" in flags or "SKIP_GRAD" in flags)
    found = []
    for *names, rows, least, tuning in table:
        if names == key and pixels >= least:
            found.append(tuning)
            if rows == 0:  # what follows is never reached
                break
    return [tuning for tuning in found if tuning]


@dataclass(frozen=True)
class Tiling:
    """Cut of (N, pixels) rows into items: parts of a sample, or whole samples side by side (segments).

    Before a max-pool a tile is pairs of image rows, which are ``line`` rows each and come in a box each; a ``halo`` is
    brought in above it.
    """

    tile_rows: int
    tiles: int
    segments: int
    line: int = 0
    halo: int = 0

    @classmethod
    def of(cls, pixels: int, group: int, most_rows: int) -> "Tiling":
        """Tiles of equal size, ``most_rows`` at most; parts of a sample begin at even rows, as its ReLU bits need."""
        segments = group // WIDTH
        while segments > 1 and pixels * segments > most_rows:
            segments //= 2
        if segments > 1 or pixels <= most_rows:
            return cls(pixels, 1, segments)
        most_rows -= most_rows % 2
        tile_rows = -(-pixels // -(-pixels // most_rows))
        tile_rows += tile_rows % 2
        return cls(tile_rows, -(-pixels // tile_rows), 1)

    @classmethod
    def of_pooled(cls, height: int, width: int, halo: bool, most_rows: int) -> "Tiling":
        """As many pairs of image rows as ``most_rows`` rows hold, one at least."""
        tile_rows = 2 * width * max(1, min(most_rows // (2 * width), height // 2))
        return cls(tile_rows, -(-height * width // tile_rows), 1, width, int(halo))

    def items(self, samples: int) -> int:
        return -(-samples // self.segments) if self.segments > 1 else samples * self.tiles

    @property
    def boxes(self) -> int:
        """Copies a tile is brought in."""
        if self.line:
            return self.tile_rows // self.line + self.halo
        return -(-self.tile_rows * self.segments // BOX_ROWS)

    @property
    def box_rows(self) -> int:
        return self.line or -(-self.tile_rows * self.segments // self.boxes)


def shared_memory(direction: str, values: dict[str, int], tuning: Tuning, tiling: Tiling) -> int:
    """Bytes that a CTA takes, as the kernels lay them out."""
    rows, segments, warps = tiling.boxes * tiling.box_rows, tuning.group // WIDTH, tuning.group // 32
    norms = 1 + values["SHORTCUT"]
    scratch = -(-28 * tuning.stages // 16) * 16 + WIDTH * 8 * segments
    if direction == "forward":
        scratch += WIDTH * 2 * 8 * warps
        stage = rows * 2 * WIDTH * (1 + values["RESIDUAL"])
        scratch += norms * (WIDTH * (8 * tuning.chunk + 2 * 4 * segments) + 4 * segments)
    else:
        grads = (tiling.tile_rows // 2 + tiling.line) // 2 if tiling.line else rows
        stage = (norms * rows + grads * (1 + values["SKIP_GRAD"])) * 2 * WIDTH + norms * tiling.segments * 8 * WIDTH
        if tiling.line:
            stage += -(-grads * 32 // 128) * 128
        if values["RELU"] and values["RESIDUAL"]:
            stage += -(-tiling.segments * even(tiling.tile_rows) * 8 // 128) * 128
        scratch += norms * (WIDTH * (2 * 8 * warps + 6 * 4 * tuning.chunk + 3 * 4 * segments) + 8 * segments)
    return tuning.stages * stage + scratch


def cut(
    direction: str, height: int, width: int, values: dict[str, int], tuning: Tuning, room: int
) -> tuple[Tiling, int]:
    """The largest tiles of images for ``room`` bytes of shared memory, and the bytes that a CTA takes of it."""
    most_rows = tuning.rows
    while True:
        if values["POOL"]:
            tiling = Tiling.of_pooled(height, width, direction == "forward", most_rows)
        else:
            tiling = Tiling.of(height * width, tuning.group, most_rows)
        if (shared := shared_memory(direction, values, tuning, tiling)) <= room:
            return tiling, shared
        assert most_rows > 0, "larger than `max_pool.supports` allows"
        most_rows -= 2


def samples_held(tiling: Tiling, tuning: Tuning, ctas: int) -> int:
    """Whole samples that the stages of the CTAs of a slab hold at once; tiles of layer scaling wait for all of one."""
    return ctas * tuning.stages // tiling.tiles


def even(rows: int) -> int:
    return rows + rows % 2
