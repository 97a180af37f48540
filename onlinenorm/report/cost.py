"""What error compensation costs, and what ImageNet would: from recorded rows of scripts/bench/training.py."""

from collections.abc import Mapping, Sequence
from typing import Any

from onlinenorm.report.markdown import markdown_table
from onlinenorm.report.spec import ReportSpec

BARE, CLAMP, SCALING = "online_none", "online_clamp", "online_layer_scaling"
ORDER = (BARE, CLAMP, SCALING, "batch")
IMAGENET_IMAGES = 1_281_167
TRAINED = "bf16"  # the precision of train.py on a GPU; it steps SGD and has OnlineNorm on the fused backend
EPOCHS = 100
Row = Mapping[str, Any]
Case = tuple[int, str, str, str, bool]  # batch, backend of the OnlineNorm rows, mode, dtype, with optimizer


def as_built(row: Row) -> bool:
    """Whether the row's network is what train.py builds: torch.compile by its defaults, the first convolution too.

    Rows of BatchNorm with other compilers and stems are its best as a rival; train.py has no key for the former.
    """
    return row.get("compiler") in (None, "default") and row.get("stem") != "conv7x7"


def as_trained(results: Mapping[str, Any], normalizer: str | None = None) -> list[Row]:
    """Rows of what train.py runs on a GPU, of one normalizer or all: with the optimizer, where such were recorded."""
    rows = [
        row
        for row in results["rows"]
        if as_built(row)
        and row.get("dtype", TRAINED) == TRAINED
        and (row["normalizer"] == "batch" or row.get("backend", "fused") == "fused")
        and normalizer in (None, row["normalizer"])
    ]
    return [row for row in rows if with_optimizer(row, results)] or rows


def with_optimizer(row: Row, results: Mapping[str, Any]) -> bool:
    return bool(row.get("optimizer", results.get("optimizer", False)))


def cases(results: Mapping[str, Any]) -> dict[Case, dict[str, Row]]:
    """Rows by normalizer for each setting of OnlineNorm rows; BatchNorm, which has no backend, joins all."""
    rows = [row for row in results["rows"] if row["normalizer"] in ORDER and as_built(row)]
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
    return row["mode"], row["dtype"], with_optimizer(row, results)


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

    With `fastest` only for the fastest setting of each batch in which train.py trains.
    """
    both = {case: group for case, group in cases(results).items() if {CLAMP, SCALING} <= group.keys()}
    if fastest:
        best = fastest_cases(results)
        both = {case: group for case, group in both.items() if case in best}
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


def fastest_cases(results: Mapping[str, Any]) -> list[Case]:
    """The fastest setting of each batch in which train.py trains and clamping and layer scaling were both measured."""
    trained = as_trained(results)
    best: dict[int, Case] = {}
    both = {case: group for case, group in cases(results).items() if {CLAMP, SCALING} <= group.keys()}
    for case in sorted(both, key=lambda case: both[case][CLAMP]["milliseconds"]):
        if both[case][CLAMP] in trained:
            best.setdefault(case[0], case)
    return list(best.values())


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
    batches = sorted({row["batch"] for row in as_trained(results)})
    body = []
    for name, published in spec.rows.items():
        rows = as_trained(results, name)
        command = f"python train.py experiment=table1 normalizer={name} data.root=IMAGENET"
        first = [row for row in rows if row["batch"] == batches[0]]
        mode = _fastest(first or rows)["mode"] if rows else ""
        fastest = [_fastest([row for row in rows if (row["batch"], row["mode"]) == (batch, mode)]) for batch in batches]
        command += " model.compile=true" * ("compile" in mode) + " trainer.cuda_graph=true" * ("graph" in mode)
        cells = [published.label, f"`{command}`"]
        cells += [hours(row["images_per_second"]) if row else "not measured" for row in fastest]
        if trained:
            cells.append(f"{hours(trained[name][0])}, batch {trained[name][1]}" if name in trained else "not run here")
        body.append([*cells, "not run here"])
    head = ["ImageNet, 100 epochs", "command", *(f"GPU hours by steps of {batch}" for batch in batches)]
    head += ["GPU hours by the training run at 224 px"] * bool(trained)
    return markdown_table([*head, "best val accuracy, best val loss"], body)


def _fastest(rows: Sequence[Row]) -> Row | None:
    return max(rows, key=lambda row: row["images_per_second"], default=None)


def hours(images_per_second: float) -> str:
    """Time of all epochs of ImageNet at a rate."""
    return f"{EPOCHS * IMAGENET_IMAGES / images_per_second / 3600:.1f} h ({images_per_second:,.0f} images/s)"


def render_imagenet(results: Mapping[str, Any], trained: Mapping[str, tuple[float, int]], spec: ReportSpec) -> str:
    """What the table's own runs would take, and what to look for in their first epochs."""
    millions = EPOCHS * IMAGENET_IMAGES / 1e6
    whole = all(with_optimizer(row, results) for name in spec.rows for row in as_trained(results, name))
    steps = "forward, backward and SGD" if whole else "forward and backward, and SGD where that was recorded"
    return "\n\n".join(
        [
            "# ImageNet: not run here",
            imagenet_table(results, trained, spec),
            f"Hours on one {results['device']} for {millions:.1f} million training images. Steps are those of "
            "`results/bench_training.json` in the command's settings and bfloat16, which is what training uses: "
            f"{steps}; no input pipeline, no validation."
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
