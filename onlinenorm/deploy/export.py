"""From a run to verified files: every file is read back and held against the network it came from before it is kept."""

import errno
import json
import math
import os
import platform
import shutil
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from onlinenorm.deploy.card import removal_line, render_card
from onlinenorm.deploy.forms import FORMS, Form, Logits, prepare, without_clamp
from onlinenorm.deploy.images import training_batches, validation_batches
from onlinenorm.deploy.source import Trained
from onlinenorm.deploy.verification import Agreement, agreements, latency_ms
from onlinenorm.errors import DeployError, VerificationError
from onlinenorm.files import staging
from onlinenorm.normalizers import update_statistics
from onlinenorm.provenance import git_state, hardware
from onlinenorm.text import first_line

FULL = 1 << 16  # bytes left on a disk that is full: a writer that was refused has left a part of its last block


@dataclass
class Row:
    """One form in the table: its file, or the reason why there is none."""

    form: str
    file: str = ""
    bytes: int = 0
    milliseconds: float | None = None
    agreement: Agreement | None = None
    reason: str = ""

    def as_dict(self) -> dict:
        if self.agreement is None:
            return {"form": self.form, "reason": self.reason}
        return {
            "form": self.form,
            "file": self.file,
            "bytes": self.bytes,
            "milliseconds": self.milliseconds,
            **self.agreement.as_dict(),
        }


@dataclass
class Export:
    """What `export` did: the forms, the source's own latency, and what removing the clamp did (None: kept)."""

    rows: list[Row]
    source_milliseconds: float | None
    removal: dict | None


def export(
    trained: Trained, names: list[str], output: Path, command: str,
    keep_clamp: bool = False, tolerance: float = 1e-4, limit: int | None = None, latency_runs: int = 20,
    reestimate: int = 0,
) -> Export:  # fmt: skip
    """Writes the forms `names` of a network, with a card each, into `output`.

    With several names, forms that cannot hold the network become rows with the reason; with one, that is an error.

    Args:
        trained: the run's network, on the CPU.
        names: keys of `FORMS`.
        output: folder; made where missing. Files of the same names are replaced, others left.
        command: to be recorded in the cards.
        keep_clamp: leave the clamp in where the form can hold it; for a network that has one.
        tolerance: largest absolute difference of a logit allowed, >= 0; no prediction may change.
        limit: validation images to compare on, spread evenly; None for all.
        latency_runs: timed calls with one image; 0 for none.
        reestimate: training images on which statistics are estimated anew without the clamp; 0 for none.

    Raises DeployError where nothing can be written, VerificationError where a file computes something else, or the
    network nothing finite without its clamp; in both cases no file is left behind.
    """
    if not tolerance >= 0:
        raise DeployError(f"--tolerance {tolerance}: must be at least 0")
    if reestimate < 0:
        raise DeployError(f"--reestimate {reestimate}: must be a number of training images, or 0 for none")
    if trained.guard != "clamp" and (reestimate or keep_clamp):
        given = f"--reestimate {reestimate}" if reestimate else "--keep-clamp"
        why = f", as {trained.clamp_off} took it away" if trained.clamp_off else ""
        raise DeployError(f"{given}: is for a network with a clamp; {trained.checkpoint} has none{why}; leave it out")
    if reestimate and keep_clamp:
        raise DeployError(f"--reestimate {reestimate}: is for a clamp that is removed; leave it or --keep-clamp out")
    bare = without_clamp(trained)
    if reestimate:
        reestimate, batches = training_batches(trained, reestimate)
        update_statistics(bare, batches)
    source = replace(trained, network=bare) if reestimate else trained
    candidates: dict[str, tuple[Logits, Logits]] = {}
    if trained.guard == "clamp" and not keep_clamp:
        candidates |= {"removal": (bare, trained.network), "trained": (trained.network, trained.network)}
    with staging(output, DeployError) as work:
        rows = [_stage(source, FORMS[name], work, keep_clamp, alone=len(names) == 1) for name in names]
        for row in rows:
            if row.file:
                loaded = FORMS[row.form].load(work / row.file, trained)
                candidates[row.form] = (loaded, trained.network if keep_clamp else bare)
        if not any(row.file for row in rows):
            raise DeployError("no form can hold this network: " + "; ".join(row.reason for row in rows))
        compared = agreements(candidates, validation_batches(trained, limit, torch.device("cpu")))
        removal = None
        if "removal" in compared:
            without, as_trained = compared.pop("removal"), compared.pop("trained")
            if math.isfinite(as_trained.max_difference) and not math.isfinite(without.max_difference):
                anew = " and on statistics estimated anew" if reestimate else ""
                raise VerificationError(
                    f"{trained.checkpoint}: refused, because the logits are NaN or infinite without the clamp{anew}; "
                    "keep it, with --keep-clamp in a form that holds it (onnx, torchscript, exported-program); nothing "
                    "was written"
                )
            removal = _removal(trained, without, as_trained, reestimate)
        image = torch.zeros(1, trained.in_channels, trained.data.image_size, trained.data.image_size)
        for row in rows:
            if row.file:
                row.agreement = compared[row.form]
                _check(row, tolerance)
                _check_recorded(trained, row.agreement, "with" if keep_clamp else "anew" if reestimate else "without")
                if latency_runs:
                    row.milliseconds = latency_ms(candidates[row.form][0], image, latency_runs)
                card = render_card(
                    trained, FORMS[row.form], row.file, keep_clamp, row.agreement, removal, command, made_with()
                )
                (work / row.file).with_suffix(".md").write_text(card, encoding="utf-8", errors="backslashreplace")
        result = Export(rows, latency_ms(trained.network, image, latency_runs) if latency_runs else None, removal)
        if len(names) > 1:
            content = facts(trained, result, command)
            text = json.dumps(content, indent=2, allow_nan=False) + "\n"
            (work / "exports.json").write_text(text, encoding="utf-8")
            (work / "exports.md").write_text(page(content), encoding="utf-8", errors="backslashreplace")
    return result


def _removal(trained: Trained, without: Agreement, as_trained: Agreement, reestimate: int) -> dict:
    """What `card.removal_line` tells: of the images compared and, where the run has more, as that recorded it."""
    results, recipe = trained.results or {}, trained.recipe
    again, clamping = results.get("reestimated") or {}, results.get("clamping") or {}
    told: dict[str, Any] = {"images_anew": reestimate} if reestimate else {}
    if again.get("val_loss") is not None and not reestimate:  # null: not finite there
        told |= {"reestimated_top1": again["val_top1"], "reestimated_images": again["images"]}
    after = clamping.get("without") if not reestimate else again if again.get("images") == reestimate else None
    if clamping and after and results["dataset"]["val_images"] > without.images:
        images = results["dataset"]["val_images"]
        told["recorded"] = {"images": images, "with": clamping["with"]["val_top1"], "without": after["val_top1"]}
    if recipe.clamp_off_epochs:  # of an earlier epoch
        told["clamp_off_epochs"] = recipe.clamp_off_epochs
    return {**without.as_dict(), "top1_with_clamp": as_trained.top1, **told}


def _stage(trained: Trained, form: Form, work: Path, keep_clamp: bool, alone: bool) -> Row:
    file = f"{trained.model_name}-{form.name}{form.suffix}"
    try:
        # for several forms at once, the clamp is kept where that is possible
        network = prepare(trained, form, keep_clamp and (alone or form.holds_guards))
        if keep_clamp and not alone and not form.holds_guards and trained.guard == "clamp":
            raise DeployError(f"--to {form.name}: holds no clamp, and --keep-clamp was asked for")
        try:
            form.write(network, trained, work / file)
        except DeployError:
            raise
        except Exception as error:  # exporters and full disks raise almost anything
            if shutil.disk_usage(work).free < FULL:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error  # which `staging` reports
            raise DeployError(
                f"--to {form.name}: could not be made ({type(error).__name__}: {first_line(error)})"
            ) from error
    except DeployError as error:
        (work / file).unlink(missing_ok=True)
        if alone:
            raise
        return Row(form.name, reason=str(error).removeprefix(f"--to {form.name}: "))
    return Row(form.name, file, (work / file).stat().st_size)


def _check(row: Row, tolerance: float) -> None:
    agreement = row.agreement
    assert agreement is not None  # compared
    if not agreement.within(tolerance):
        raise VerificationError(
            f"--to {row.form}: refused, because the export does not compute what the network does: logits differ by up "
            f"to {agreement.max_difference:.3g} (--tolerance {tolerance:g}) and {agreement.changed_predictions} of "
            f"{agreement.images} predictions change; nothing was written"
        )


def _check_recorded(trained: Trained, agreement: Agreement, clamp: str) -> None:
    """Raises VerificationError where a network is not as accurate as its run has recorded, on the run's own images.

    `clamp` is "with", "without", or "anew" on other statistics, of which nothing may be recorded.

    So it is where it keeps state that no checkpoint holds. Two points are for other arithmetic, and five standard
    deviations for a part of the images.
    """
    results, data = trained.results, trained.data
    if results is None or agreement.top1 is None or data.evaluation != trained.recipe.evaluation:
        return
    if data.fingerprint != results["dataset"].get("fingerprint"):
        return
    clamping = results.get("clamping")
    figures = results.get("reestimated") if clamp == "anew" else clamping[clamp] if clamping else results["last"]
    if figures is None:
        return
    recorded = figures["val_top1"]
    images = agreement.labelled
    part = 5 * math.sqrt(recorded * (1 - recorded) / images) if images < data.val_images else 0.0
    if abs(agreement.top1 - recorded) > 0.02 + 2 / images + part:
        raise VerificationError(
            f"{trained.checkpoint}: refused, because the network loaded from it has {agreement.top1:.2%} top-1 on "
            f"{images} images of the run, and results.json says {recorded:.2%}: it keeps state that checkpoints do not "
            "hold, outside of buffers that are saved, or its class has changed; nothing was written"
        )


def made_with() -> dict[str, str]:
    """Versions, commit and processor of this export."""
    versions = {"torch": str(torch.__version__)}
    for package in ("torchvision", "onnx", "onnxruntime", "safetensors"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    versions["python"] = platform.python_version()
    git = git_state()
    versions["commit"] = git["commit"] + (" (with local changes)" if git["dirty"] else "")
    return versions


def facts(trained: Trained, result: Export, command: str) -> dict:
    """The content of exports.json."""
    return {
        "model": trained.model_name,
        "normalizer": trained.config["choices"]["normalizer"],
        "checkpoint": trained.checkpoint.name,
        "command": command,
        "hardware": hardware(),
        "threads": torch.get_num_threads(),
        "made_with": made_with(),
        "source_milliseconds": result.source_milliseconds,
        "clamp_removal": result.removal,
        "rows": [row.as_dict() for row in result.rows],
    }


def table(content: dict) -> str:
    """What `facts` gives as Markdown: the forms, what the clamp's removal changed, and why forms are refused."""
    written = [row for row in content["rows"] if "file" in row]
    refused = [row for row in content["rows"] if "reason" in row]
    lines = [
        "| form | file | MB | ms, one image, CPU | largest logit difference | predictions changed |",
        "|---|---|---|---|---|---|",
    ]
    if content["source_milliseconds"] is not None:
        lines.append(f"| the trained network | {content['checkpoint']} | | {content['source_milliseconds']:.2f} | | |")
    for row in written:
        milliseconds = "" if row["milliseconds"] is None else f"{row['milliseconds']:.2f}"
        lines.append(
            f"| {row['form']} | {row['file']} | {row['bytes'] / 1e6:.2f} | {milliseconds} "
            f"| {row['max_logit_difference']:.1e} | {row['changed_predictions']} of {row['images']} |"
        )
    lines += [f"| {row['form']} | refused | | | | |" for row in refused]
    notes = [f"{row['form']}: {row['reason']}" for row in refused]
    if removal := content["clamp_removal"]:
        notes.insert(0, removal_line(removal))
    return "\n".join(lines) + "\n" + "".join(f"\n{note}\n" for note in notes)


def page(content: dict) -> str:
    """exports.md: `table` with what it was made of, where and by which command."""
    versions = ", ".join(f"{name} {value}" for name, value in content["made_with"].items())
    threads = f"{content['threads']} thread" + "s" * (content["threads"] != 1)
    return (
        f"# {content['model']}, {content['normalizer']}: forms, sizes and latencies\n\n{table(content)}\n"
        f"Against the network that was exported, in float32 on validation images. {content['hardware']}, {threads}; "
        f"{versions}; `{content['command']}`\n"
    )
