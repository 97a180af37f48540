"""scripts/sweep.py: runs of the same images are decoded alike."""

import json
from pathlib import Path

import yaml
from tests_training import RESULTS, load_train_module

from onlinenorm.training import matrix
from scripts import sweep

PHOTOS = (
    "model=cifar_resnet8",
    "data=imagenet",
    "data.root=/nowhere",
    "recipe=cifar",
    "trainer=cpu",
    "normalizer=batch",
)


def begun(row, decoder):
    """The folder of a row as a run leaves it whose decoder was chosen."""
    config = load_train_module().load_config(list(row.overrides))
    config["data"]["decoder"] = decoder
    row.folder.mkdir(parents=True)
    (row.folder / "config.yaml").write_text(yaml.safe_dump(config))
    (row.folder / "results.json").write_text(json.dumps(RESULTS))


def test_runs_of_the_same_images_are_decoded_as_the_first_was(run_sweep, tmp_path, capsys):
    rows = sweep.plan([*PHOTOS, "seed=0,1", "data.image_size=64,32"], Path("runs"))
    assert all(matrix.decoder_of(row, rows) is None for row in rows)
    begun(rows[0], "torchvision")
    fixed = [matrix.decoder_of(row, rows) for row in rows]
    assert fixed == ["torchvision", None, "torchvision", None], "of 64 pixels; those of 32 are another table's"
    again = [*PHOTOS, "seed=0,1", "data.image_size=64,32"]
    assert sweep.main([*again, "--dry-run"]) == 0
    commands = [line for line in capsys.readouterr().out.splitlines() if line.startswith("python")]
    assert ["data.decoder=torchvision" in line for line in commands] == [False, True, False]
    for said in ("data.decoder=pillow", "data.decoder=torchvision,pillow"):
        rows = sweep.plan([*PHOTOS, "seed=0,1", said], tmp_path / "asked")
        assert all(row.images == "" and "auto" not in row.command(row.folder, "nvjpeg")[-2] for row in rows)


def test_the_run_is_started_with_it(run_sweep, tmp_path):
    begun(sweep.plan([*PHOTOS, "seed=1"], Path("runs"))[0], "torchvision")
    assert sweep.main([*PHOTOS, "seed=0,1"]) == 0
    written = yaml.safe_load(Path("runs/default/batch/seed0/config.yaml").read_text())
    assert written["data"]["decoder"] == "torchvision"


def test_several_decoders_of_a_table_are_told(run_sweep, tmp_path, monkeypatch, capsys):
    rows = sweep.plan([*PHOTOS, "seed=0,1,2"], Path("runs"))
    assert matrix.decoder_notes(rows, rows, submitted=False) == [], "all are decoded as the first, on this machine"
    (note,) = matrix.decoder_notes(rows, rows, submitted=True)
    assert note.startswith("data.decoder: auto, by each job's machine") and "data.decoder=pillow" in note
    assert matrix.decoder_notes(rows, rows[:1], submitted=True) == []
    begun(rows[0], "torchvision")
    assert matrix.decoder_notes(rows, rows[1:], submitted=True) == [], "which the others are given"
    begun(rows[2], "nvjpeg")
    assert sweep.main([*PHOTOS, "seed=0,1,2", "--status"]) == 1
    assert (
        "data.decoder: nvjpeg (runs/default/batch/seed2), torchvision (runs/default/batch/seed0) decode the same images"
    ) in capsys.readouterr().out
    assert matrix.decoder_of(rows[2], rows) == "nvjpeg", "which it goes on with"
