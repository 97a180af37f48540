"""Runs are loaded whole or refused in one line, whatever is wrong with them, by every script that loads them."""

import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
import yaml

from onlinenorm.deploy import DeployError, load_trained
from onlinenorm.deploy.images import validation_batches
from onlinenorm.normalizers import OnlineNorm
from onlinenorm.training.checkpoint import read


def test_a_run_whose_images_lay_on_its_device_is_read_a_batch_at_a_time(on_device_run):
    trained = load_trained(on_device_run)
    (images, labels, _), *_ = validation_batches(trained, 5, torch.device("cpu"))
    assert trained.config["data"]["on_device"] is True and len(images) == len(labels) == 5


def test_run_folder_gives_the_network_that_was_validated(clamp_run):
    trained = load_trained(clamp_run)
    assert trained.model_name == "cifar_resnet8" and trained.guard == "clamp"
    assert trained.results["normalizer"] == "online_clamp"
    assert not any(module.training for module in trained.network.modules())
    predictions, indices = [], []
    for images, _, index in validation_batches(trained, None, torch.device("cpu")):
        predictions.append(trained.network(images).argmax(1))
        indices.append(index)
    with np.load(clamp_run / "predictions.npz") as recorded:
        assert torch.cat(indices).tolist() == recorded["index"].tolist()
        assert torch.cat(predictions).tolist() == recorded["with_clamp"].tolist()


def test_checkpoint_files_of_a_run(clamp_run, copied):
    folder = copied(clamp_run)
    best = load_trained(folder / "checkpoints" / "best.ckpt")
    assert best.top1 == read(folder / "checkpoints" / "best.ckpt")["val_top1"]
    content = read(folder / "checkpoints" / "last.ckpt")
    content["state_dict"]["network.fc.bias"] += 1
    torch.save(content, folder / "checkpoints" / "previous.ckpt")
    other = load_trained(folder / "checkpoints" / "previous.ckpt")
    assert other.results is None  # they speak of other weights
    torch.testing.assert_close(other.network.fc.bias, best.network.fc.bias + 1)


def test_images_are_spread_evenly(clamp_run):
    batches = list(validation_batches(load_trained(clamp_run), 6, torch.device("cpu"), batch_size=4))
    assert [len(images) for images, _, _ in batches] == [4, 2]
    assert torch.cat([index for _, _, index in batches]).tolist() == [0, 10, 20, 30, 40, 50]


def test_backend_of_another_machine_does_not_matter(clamp_run, copied):
    folder = copied(clamp_run)
    edit_config(folder, lambda config: config["normalizer"].update(backend="fused"))
    trained = load_trained(folder)
    assert {m.backend for m in trained.network.modules() if isinstance(m, OnlineNorm)} == {"auto"}


def test_images_of_a_run_with_its_set_on_the_device_are_read_from_where_they_lie(clamp_run, copied):
    folder = copied(clamp_run)
    edit_config(folder, lambda config: config["data"].update(on_device=True))
    ours, theirs = (validation_batches(load_trained(run), 6, torch.device("cpu")) for run in (folder, clamp_run))
    for a, b in zip(ours, theirs, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_dataset_may_be_elsewhere(clamp_run, copied, tmp_path):
    folder = copied(clamp_run)
    edit_config(folder, lambda config: config["data"].update(embedded=False))
    trained = load_trained(folder, data_root=str(tmp_path))
    assert trained.data.root == str(tmp_path)


def test_sizes_are_read_from_weights_by_the_networks_class(clamp_run, copied):
    folder = copied(clamp_run)
    trained = load_trained(folder)
    assert (trained.num_classes, trained.in_channels) == (10, 1)
    edit_checkpoint(folder, lambda content: content["state_dict"].pop("network.fc.weight"))
    with pytest.raises(DeployError, match=r"last.ckpt: holds no network of onlinenorm.models.cifar_resnet8 \(KeyError"):
        load_trained(folder)


class Bomb:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def edit_config(folder, change):
    path = folder / "config.yaml"
    config = yaml.safe_load(path.read_text())
    change(config)
    path.write_text(yaml.safe_dump(config))


def edit_checkpoint(folder, change):
    path = folder / "checkpoints" / "last.ckpt"
    content = read(path)
    change(content)
    torch.save(content, path)


def target(node, name):
    return lambda folder, trace: edit_config(folder, lambda config: config[node].update(_target_=name))


def bomb(folder, trace):
    torch.save({"state_dict": Bomb(trace)}, folder / "checkpoints" / "last.ckpt")


def legacy_bomb(folder, trace):
    (folder / "checkpoints" / "last.ckpt").write_bytes(pickle.dumps(Bomb(trace)))


def yaml_bomb(folder, trace):
    (folder / "config.yaml").write_text(f"model: !!python/object/apply:os.mkdir ['{trace}']\n")


def truncated(folder, trace):
    path = folder / "checkpoints" / "last.ckpt"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped(folder, trace):
    path = folder / "checkpoints" / "last.ckpt"
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    content = bytearray(path.read_bytes())
    content[largest.header_offset + 200 + largest.file_size // 2] ^= 255
    path.write_bytes(content)


def escape(name):
    def damage(folder, trace):
        outside = folder.parent / "outside"
        (folder / name).rename(outside)
        (folder / name).symlink_to(outside)

    return damage


def not_finite(folder, trace):
    edit_checkpoint(folder, lambda content: content["state_dict"]["network.fc.bias"].fill_(float("nan")))


DAMAGE = {
    "no config": (lambda folder, trace: (folder / "config.yaml").unlink(), "is not a run folder"),
    "no weights": (lambda folder, trace: (folder / "checkpoints" / "last.ckpt").unlink(), "saved no weights"),
    "foreign network": (target("model", "os.system"), "model._target_: 'os.system' is foreign"),
    "foreign trainer": (target("trainer", "subprocess.run"), "trainer._target_: 'subprocess.run' is foreign"),
    "function of ours": (target("model", "onlinenorm.files.write_atomically"), "is refused; there are"),
    "class of ours": (target("data", "onlinenorm.data.GlobalBatchSampler"), "is refused; there are"),
    "wrong kind of config": (lambda folder, trace: (folder / "config.yaml").write_text("- 1\n"), "holds no mapping"),
    "unknown key": (
        lambda folder, trace: edit_config(folder, lambda config: config["model"].update(widht=3)),
        "model.widht: no such key",
    ),
    "pickle bomb": (bomb, ".mkdir) and is refused: loading it could run code"),
    "old pickle bomb": (legacy_bomb, "is damaged or no checkpoint"),
    "yaml bomb": (yaml_bomb, "config.yaml: is damaged"),
    "truncated": (truncated, "is damaged"),
    "flipped bits": (flipped, "is damaged"),
    "a text": (lambda folder, trace: (folder / "checkpoints" / "last.ckpt").write_text("weights"), "last.ckpt is"),
    "empty": (lambda folder, trace: (folder / "checkpoints" / "last.ckpt").write_bytes(b""), "is damaged"),
    "tensors alone": (
        lambda folder, trace: torch.save(torch.zeros(3), folder / "checkpoints" / "last.ckpt"),
        "holds no network",
    ),
    "checkpoint outside": (escape("checkpoints/last.ckpt"), "leads outside the run folder"),
    "config outside": (escape("config.yaml"), "leads outside the run folder"),
    "results damaged": (lambda folder, trace: (folder / "results.json").write_text("{"), "results.json: is damaged"),
    "not finite": (not_finite, "network diverged|diverged"),
    "another network": (target("model", "onlinenorm.models.cifar_resnet14"), "does not fit the network"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["export", "audit_clamping", "predict"])
def test_damaged_foreign_and_outside_runs_are_refused_in_one_line(
    name, damage, clamp_run, copied, script, tmp_path, capsys
):
    folder, trace, output = copied(clamp_run), tmp_path / "trace", tmp_path / "output"
    change, words = DAMAGE[damage]
    change(folder, trace)
    image = tmp_path / "image.png"
    image.write_bytes(b"")
    more = {"export": ["--to", "torchvision", "--output", output], "audit_clamping": ["--output", output]}
    before = sorted(path.name for path in folder.iterdir())
    assert script(name)(folder, *more.get(name, [image])) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1, printed.err
    assert any(word in printed.err for word in words.split("|")), printed.err
    assert not trace.exists(), "code of the run was executed"
    assert not output.exists() and sorted(path.name for path in folder.iterdir()) == before


def test_checkpoints_outside_a_run_and_missing_paths_are_refused(clamp_run, tmp_path):
    stray = tmp_path / "deep" / "stray.ckpt"
    stray.parent.mkdir()
    stray.write_bytes((clamp_run / "checkpoints" / "last.ckpt").read_bytes())
    with pytest.raises(DeployError, match="lies in no run folder"):
        load_trained(stray)
    with pytest.raises(DeployError, match="does not exist"):
        load_trained(tmp_path / "nowhere")
    with pytest.raises(DeployError, match="is not a run folder"):
        load_trained(tmp_path)
    link = clamp_run / "checkpoints" / "link.ckpt"
    link.symlink_to(stray)
    try:
        with pytest.raises(DeployError, match="leads outside"):
            load_trained(link)
    finally:
        link.unlink()


def test_a_run_folder_may_itself_be_reached_through_a_link(clamp_run, tmp_path):
    (tmp_path / "link").symlink_to(clamp_run)
    assert load_trained(tmp_path / "link").folder == clamp_run.resolve()


def test_bombs_go_off_without_the_protection(tmp_path):
    # the other tests would pass with a dud
    pickle.loads(pickle.dumps(Bomb(tmp_path / "trace")))
    assert (tmp_path / "trace").exists()


def test_what_is_allowed_is_still_of_a_package_of_ones_own(clamp_run, copied):
    folder = copied(clamp_run)
    for node, name in {"model": "os.system", "normalizer": "torch.load", "trainer": "subprocess.run"}.items():
        edit_config(folder, lambda config, node=node, name=name: config[node].update(_target_=name))
        with pytest.raises(DeployError, match=f"{node}._target_: {name!r} is .*refused"):
            load_trained(folder, allowed=["os.system", "torch.load", "subprocess.run"])
        edit_config(folder, lambda config, node=node: config.update({node: read_config(clamp_run)[node]}))


def read_config(folder):
    return yaml.safe_load((folder / "config.yaml").read_text())
