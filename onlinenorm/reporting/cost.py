"""What error compensation costs, and what ImageNet would: from recorded rows of scripts/bench_training.py."""

from collections.abc import Mapping
from typing import Any

from onlinenorm.reporting.markdown import markdown_table
from onlinenorm.reporting.spec import ReportSpec

BARE, CLAMP, SCALING = "online_none", "online_clamp", "online_layer_scaling"
ORDER = (BARE, CLAMP, SCALING, "batch")
IMAGENET_IMAGES = 1_281_167
TRAINABLE = ("bf16", "fp32")  # train.py refuses fp16, whose changing loss scale the control state would keep
EPOCHS = 100
Row = Mapping[str, Any]
Case = tuple[int, str, str, str, bool]  # batch, backend of the OnlineNorm rows, mode, dtype, with optimizer


def cases(results: Mapping[str, Any]) -> dict[Case, dict[str, Row]]:
    """Rows by normalizer for each setting of OnlineNorm rows; BatchNorm, which has no backend, joins all."""
    rows = [row for row in results["rows"] if row["normalizer"] in ORDER]
    found: dict[Case, dict[str, Row]] = {}
    for row in rows:
        if row["normalizer"] != "batch":
            found.setdefault((row["batch"], row["backend"], *_rest(row, results)), {})[row["normalizer"]] = row
    for row in rows:
        if row["normalizer"] == "batch":
            for case, group in found.items():
                if (case[0], *case[2:]) == (row["batch"], *_rest(row, results)):
                    group["batch"] = row
    return dict(sorted(found.items(), key=lambda item: (-item[0][0], *map(str, item[0][1:]))))


def _rest(row: Row, results: Mapping[str, Any]) -> tuple[str, str, bool]:
    return row["mode"], row["dtype"], bool(row.get("optimizer", results.get("optimizer", False)))


def describe(case: Case) -> str:
    """A setting in words."""
    batch, backend, mode, dtype, optimizer = case
    return f"batch {batch}, {backend} backend, {mode}, {dtype}" + (", with optimizer" if optimizer else "")


def cost_table(results: Mapping[str, Any], spec: ReportSpec) -> str:
    """A line a normalizer and setting: step, rate and memory, and how much more than without compensation."""
    body = []
    for case, group in cases(results).items():
        for name in ORDER:
            if name not in group:
                continue
            row, bare = group[name], group.get(BARE)
            cells = [
                describe(case),
                spec.row(name).label,
                step_time(row),
            ]
            cells += [f"{row['images_per_second']:,.0f}", f"{row['peak_memory_gib']:.2f}"]
            cells.append(f"{over(row, bare):+.1%}" if bare and name != BARE else "–")
            cells.append(f"{row['peak_memory_gib'] - bare['peak_memory_gib']:+.2f}" if bare and name != BARE else "–")
            body.append(cells)
    head = [
        "setting", "normalizer", "ms a step", "images/s", "peak memory, GiB", "time over no compensation",
        "memory over it, GiB",
    ]  # fmt: skip
    return markdown_table(head, body)


def step_time(row: Row) -> str:
    """Milliseconds of a step, and half the spread of repeats, where it was recorded."""
    spread = row["repeat_spread"]
    return f"{row['milliseconds']:.2f}" + ("" if spread is None else f" ± {spread / 2:.1%}")


def over(row: Row, other: Row) -> float:
    """How much longer a step of `row` takes, as a fraction of a step of `other`."""
    return row["milliseconds"] / other["milliseconds"] - 1


def cost_sentences(results: Mapping[str, Any], fastest: bool = False) -> list[str]:
    """Is clamping cheaper than layer scaling? A sentence for each setting in which both were measured.

    With `fastest` only for the fastest setting of each batch and backend.
    """
    both = {case: group for case, group in cases(results).items() if {CLAMP, SCALING} <= group.keys()}
    if fastest:
        best: dict[tuple[int, str], Case] = {}
        for case in sorted(both, key=lambda c: both[c][CLAMP]["milliseconds"]):
            best.setdefault(case[:2], case)
        both = {case: group for case, group in both.items() if case in best.values()}
    sentences = []
    for case, group in both.items():
        clamp, scaling = group[CLAMP], group[SCALING]
        gap = scaling["milliseconds"] - clamp["milliseconds"]
        noise = sum((row["repeat_spread"] or 0) * row["milliseconds"] for row in (clamp, scaling)) / 2
        word = "equal within the spread of repeats" if abs(gap) <= noise else "cheaper" if gap > 0 else "dearer"
        verdict = "clamping and layer scaling are" if word.startswith("equal") else "clamping is"
        than = "" if word.startswith("equal") else " than layer scaling"
        beyond = ""
        if BARE in group:
            costs = f"{over(clamp, group[BARE]):+.1%} and {over(scaling, group[BARE]):+.1%}"
            beyond = f"; over no compensation they cost {costs}"
        numbers = f"{clamp['milliseconds']:.2f} against {scaling['milliseconds']:.2f} ms a step"
        memory = f"{clamp['peak_memory_gib']:.2f} against {scaling['peak_memory_gib']:.2f} GiB"
        sentences.append(f"{describe(case)}: {verdict} {word}{than} ({numbers}, {memory}{beyond})")
    return sentences


def origin(results: Mapping[str, Any]) -> str:
    """Where a recorded benchmark comes from, in one line."""
    commit = f"commit {results['commit']}"
    return f"torch {results['torch']}, triton {results['triton']}, {commit}; `{results['command']}`"


def render_cost(results: Mapping[str, Any], spec: ReportSpec) -> str:
    """The cost of error compensation as Markdown."""
    sentences = cost_sentences(results)
    missing = "Clamping and layer scaling have not been measured side by side: not run here."
    return "\n\n".join(
        [
            f"# Cost of error compensation: ResNet-50, 224 px, {results['device']}",
            cost_table(results, spec),
            "\n".join(f"- {sentence}." for sentence in sentences) or missing,
            "A step is forward and backward, and the optimizer's where the setting says so. ± is half the spread of "
            "repeats, where recorded.",
            origin(results),
        ]
    ) + "\n"  # fmt: skip


def imagenet_table(results: Mapping[str, Any], trained: Mapping[str, tuple[float, int]], spec: ReportSpec) -> str:
    """The published rows with their commands and the GPU hours that measured rates make expect.

    `trained` maps a normalizer to (images/s, batch) of a whole training run of the same network and image size.
    """
    rows = [row for row in results["rows"] if row["dtype"] in TRAINABLE]
    batches = sorted({row["batch"] for row in rows})
    body = []
    for name, published in spec.rows.items():
        fastest = []
        for batch in batches:
            mine = [row for row in rows if (row["normalizer"], row["batch"]) == (name, batch)]
            mine = [row for row in mine if row.get("optimizer", results.get("optimizer"))] or mine
            fastest.append(max(mine, key=lambda row: row["images_per_second"], default=None))
        command = f"python train.py experiment=table1 normalizer={name} data.root=IMAGENET"
        mode = next((row["mode"] for row in fastest if row), "")
        command += " model.compile=true" * ("compile" in mode) + " trainer.cuda_graph=true" * ("graph" in mode)
        cells = [published.label, f"`{command}`"]
        cells += [hours(row["images_per_second"]) if row else "not measured" for row in fastest]
        if trained:
            cells.append(f"{hours(trained[name][0])}, batch {trained[name][1]}" if name in trained else "not run here")
        body.append([*cells, "not run here"])
    head = ["ImageNet, 100 epochs", "command", *(f"GPU hours by steps of {batch}" for batch in batches)]
    head += ["GPU hours by the training run at 224 px"] * bool(trained)
    return markdown_table([*head, "best val accuracy, best val loss"], body)


def hours(images_per_second: float) -> str:
    """Time of all epochs of ImageNet at a rate."""
    return f"{EPOCHS * IMAGENET_IMAGES / images_per_second / 3600:.1f} h ({images_per_second:,.0f} images/s)"


def render_imagenet(results: Mapping[str, Any], trained: Mapping[str, tuple[float, int]], spec: ReportSpec) -> str:
    """What the table's own runs would take, and what to look for in their first epochs."""
    millions = EPOCHS * IMAGENET_IMAGES / 1e6
    return "\n\n".join(
        [
            "# ImageNet: not run here",
            imagenet_table(results, trained, spec),
            f"Hours on one {results['device']} for {millions:.1f} million training images. Steps are those of "
            "`results/bench_training.json` in the precision that training uses, the fastest setting recorded, with the "
            "optimizer where such rows are: no input pipeline, no validation."
            + " The other column is the whole training run above, its images in GPU memory." * bool(trained)
            + " Decoding JPEG fast enough is not in them: `scripts/check.py` tells before a run. The commands train "
            "with batches of 32; `recipe.batch_size=256` follows the same path by the recipe's rule, in larger steps.",
            expectations(),
        ]
    ) + "\n"  # fmt: skip


def expectations() -> str:
    """What the first epochs should show, by reasoning alone: nothing here has been run or looked up."""
    return (
        "What to look for, reasoned and not measured. After epoch 1: train and validation loss below ln(1000) = "
        "6.91 nats and top-1 above 0.1 %, which is guessing; all of `metrics.csv` finite. After epoch 5: the train "
        "loss has fallen in each epoch, the validation loss too but for bumps (the learning rate keeps its full "
        "value until epoch 30), and the three rows lie in one range. A loss that stays at 6.91 or becomes NaN is a "
        "fault: stop there."
    )
