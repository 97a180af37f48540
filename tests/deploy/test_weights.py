"""Files of weights, with safetensors and without."""

import dataclasses
import importlib.util

import pytest
import torch

from onlinenorm.deploy import FORMS, DeployError, load_folded, load_trained
from onlinenorm.deploy.export import export
from onlinenorm.deploy.weights import read_weights, write_weights


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("about", [{}, {"model": "resnet18", "arguments": "{}"}])
def test_weights_and_texts_come_back(suffix, about, tmp_path):
    state = {"a.weight": torch.randn(3, 4), "a.count": torch.tensor(5)}
    write_weights(state, about, tmp_path / f"file{suffix}")
    found, texts = read_weights(tmp_path / f"file{suffix}")
    assert found.keys() == state.keys() and all(torch.equal(found[key], state[key]) for key in state)
    assert texts.items() >= about.items()


def test_exports_without_safetensors_are_plain_torch_files(clamp_run, tmp_path, monkeypatch):
    for name in ("torchvision", "folded"):
        monkeypatch.setitem(FORMS, name, dataclasses.replace(FORMS[name], suffix=".pt"))
    export(load_trained(clamp_run), ["torchvision", "folded"], tmp_path, "test", latency_runs=0)
    state = torch.load(tmp_path / "cifar_resnet8-torchvision.pt", weights_only=True)
    assert "layer2.0.downsample.1.running_var" in state
    assert load_folded(tmp_path / "cifar_resnet8-folded.pt").conv1.bias is not None


def test_a_file_of_another_form_is_no_folded_network(tmp_path):
    write_weights({"a": torch.zeros(1)}, {}, tmp_path / "file.safetensors")
    with pytest.raises(DeployError, match="is no file made with --to folded"):
        load_folded(tmp_path / "file.safetensors")


def test_missing_onnx_is_said_with_the_remedy(clamp_run, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DeployError, match=r"needs onnx, onnxscript, onnxruntime; pip install .*\[onnx\]"):
        export(load_trained(clamp_run), ["onnx"], tmp_path / "new", "test")
    assert not (tmp_path / "new").exists()
