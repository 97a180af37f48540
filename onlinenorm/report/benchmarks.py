"""What a training step costs, and what ImageNet would take: frames of what scripts/bench/training.py records."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

BARE, CLAMP, SCALING = "online_none", "online_clamp", "online_layer_scaling"
ORDER = (BARE, CLAMP, SCALING, "batch")
CASE = ["batch", "backend", "mode", "dtype", "optimizer"]  # a setting; the backend is that of the OnlineNorm rows
TRAINED = "bf16"  # the precision of train.py on a GPU; it steps SGD and has OnlineNorm on the fused backend
IMAGENET_IMAGES, EPOCHS = 1_281_167, 100


def steps(results: Mapping[str, Any]) -> pd.DataFrame:
    """Rows of the networks that train.py builds, `trained` those that it runs on a GPU.

    It has torch.compile by its defaults and the first convolution too, which OnlineNorm's rows have: rows of BatchNorm
    with other compilers and stems are its best as a rival.
    """
    frame = _measured(results)
    own = frame.loc[frame["normalizer"] != "batch", "stem"]
    stems = frame["stem"].isin(own) if len(own) else frame["stem"] != "conv7x7"
    return frame[(frame["compiler"].isna() | (frame["compiler"] == "default")) & stems]


def _measured(results: Mapping[str, Any]) -> pd.DataFrame:
    absent = {"mode": None, "dtype": None, "compiler": None, "stem": None, "repeat_spread": None, "backend": "fused"}
    frame = pd.DataFrame([{**absent, "optimizer": results.get("optimizer", False), **row} for row in results["rows"]])
    frame["optimizer"] = frame["optimizer"].astype(bool)
    fused = (frame["normalizer"] == "batch") | (frame["backend"] == "fused")
    return frame.assign(trained=fused & (frame["dtype"].isna() | (frame["dtype"] == TRAINED)))


def as_trained(steps: pd.DataFrame, normalizer: str | None = None) -> pd.DataFrame:
    """Rows of what train.py runs, of one normalizer or all: with the optimizer, where such were recorded."""
    rows = steps[steps["trained"] & ((steps["normalizer"] == normalizer) | (normalizer is None))]
    return rows[rows["optimizer"]] if rows["optimizer"].any() else rows


def fastest(rows: pd.DataFrame) -> pd.Series | None:
    """The row of most images/s, the first of equal ones; None of no rows."""
    return None if rows.empty else rows.loc[rows["images_per_second"].idxmax()]


def costs(steps: pd.DataFrame) -> pd.DataFrame:
    """Rows by setting, the largest batch first: BatchNorm, which has no backend, beside each in which OnlineNorm ran.

    `over` and `memory_over` are time (a fraction) and peak memory (GiB) over a step without compensation, NaN without.
    """
    rows = steps[steps["normalizer"].isin(ORDER)]
    own, batch = rows[rows["normalizer"] != "batch"], rows[rows["normalizer"] == "batch"]
    beside = batch.drop(columns="backend").merge(
        own[CASE].drop_duplicates(), on=[key for key in CASE if key != "backend"]
    )
    rows = pd.concat([own, beside]).drop_duplicates([*CASE, "normalizer"], keep="last")
    rows["normalizer"] = pd.Categorical(rows["normalizer"], ORDER, ordered=True)
    rows = rows.sort_values([*CASE, "normalizer"], ascending=[key != "batch" for key in [*CASE, "normalizer"]])
    bare = rows[rows["normalizer"] == BARE][[*CASE, "milliseconds", "peak_memory_gib"]]
    rows = rows.astype({"normalizer": str}).merge(bare, how="left", on=CASE, suffixes=("", "_bare"))
    return rows.assign(
        over=rows["milliseconds"] / rows["milliseconds_bare"] - 1,
        memory_over=rows["peak_memory_gib"] - rows["peak_memory_gib_bare"],
    )


def clamping_against_scaling(steps: pd.DataFrame, trained: bool = False) -> pd.DataFrame:
    """A row a setting in which both were measured, their columns with suffixes "_clamp" and "_scaling".

    `gap` is how many milliseconds less clamping takes, `noise` half the summed spread of repeats. With `trained` only
    the fastest setting of each batch in which train.py trains.
    """
    rows = costs(steps)
    sides = (rows[rows["normalizer"] == name] for name in (CLAMP, SCALING))
    both = pd.merge(*sides, how="inner", on=CASE, suffixes=("_clamp", "_scaling"))
    spreads = [both[f"repeat_spread{side}"].fillna(0) * both[f"milliseconds{side}"] for side in ("_clamp", "_scaling")]
    both = both.assign(gap=both["milliseconds_scaling"] - both["milliseconds_clamp"], noise=sum(spreads) / 2)
    if not trained:
        return both
    run = as_trained(steps)
    both = both.merge(run[run["normalizer"] == CLAMP][CASE], on=CASE).sort_values("milliseconds_clamp", kind="stable")
    return both.drop_duplicates("batch").sort_values("batch", ascending=False)


def best(results: Mapping[str, Any], batch: int | None = None) -> pd.DataFrame:
    """A row a normalizer: its fastest step in the precision of train.py, whatever the compiler's settings and the stem.

    Of one batch, the largest without it; with the optimizer, where that was recorded. No rows of what was not measured.
    """
    rows = as_trained(_measured(results))
    rows = rows[rows["normalizer"].isin(ORDER)]
    rows = rows[rows["batch"] == (rows["batch"].max() if batch is None else batch)]
    rows = rows.sort_values("images_per_second", ascending=False, kind="stable").drop_duplicates("normalizer")
    return rows.sort_values("normalizer", key=lambda names: names.map(ORDER.index))


def imagenet(steps: pd.DataFrame, normalizers: list[str]) -> pd.DataFrame:
    """A row a normalizer: the `mode` that its command asks for, and a column a batch size: images/s in that mode."""
    batches = sorted(set(as_trained(steps)["batch"]))
    rows = []
    for name in normalizers:
        mine = as_trained(steps, name)
        first = fastest(mine[mine["batch"].isin(batches[:1])])
        first = fastest(mine) if first is None else first
        mode = "" if first is None else first["mode"]
        rates = mine[mine["mode"] == mode].groupby("batch")["images_per_second"].max()
        rows.append({"normalizer": name, "mode": mode, **rates})
    return pd.DataFrame(rows, columns=["normalizer", "mode", *batches])


def hours(images_per_second: float) -> float:
    """Time of all epochs of ImageNet at a rate."""
    return EPOCHS * IMAGENET_IMAGES / images_per_second / 3600
