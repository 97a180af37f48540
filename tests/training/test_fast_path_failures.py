"""What auto chose and then failed: taken back before the first step, an error of the run after it."""

import json
from types import SimpleNamespace

import pytest
import torch
import yaml
from tests_training import TINY, outcome

from onlinenorm.cli.compose import load_config
from onlinenorm.errors import RunError
from onlinenorm.training import fast_path
from onlinenorm.training import run as run_module
from onlinenorm.training.config_check import AUTO_KEYS
from onlinenorm.training.fast_path import Choice, FastPathFailed, culprit, naming_fast_path, with_values
from onlinenorm.training.module import ImageClassifier


@pytest.mark.parametrize(
    "error, keys, expected",
    [
        (torch.OutOfMemoryError("CUDA out of memory"), list(AUTO_KEYS), "data.on_device"),
        (torch.OutOfMemoryError("CUDA out of memory"), ["model.compile", "trainer.cuda_graph"], "trainer.cuda_graph"),
        (torch.OutOfMemoryError("CUDA out of memory"), ["model.compile"], None),
        (RuntimeError("operation not permitted when stream is capturing"), list(AUTO_KEYS), "trainer.cuda_graph"),
        (RuntimeError("operation not permitted when stream is capturing"), ["model.compile"], None),
        (KeyError("bug"), list(AUTO_KEYS), None),
    ],
)
def test_what_an_error_is_due_to(error, keys, expected):
    assert culprit(error, keys) == expected


def test_errors_of_the_compiler_are_known_by_where_they_come_from(monkeypatch):
    """As torch wraps what Inductor raises, and below another error; the message names the cause."""

    def refuse(*_, **__):
        raise RuntimeError("no code today")

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", refuse)
    layer = torch.nn.Linear(2, 2)
    layer.compile()
    choice = Choice(with_values(load_config([*TINY]), {"model.compile": True}), None, {}, ["model.compile"])
    trainer = SimpleNamespace(global_step=0, world_size=1)
    with (
        pytest.raises(
            FastPathFailed, match=r"\(backend='inductor' raised: RuntimeError: no code today\); the run goes"
        ) as e,
        naming_fast_path(choice, trainer),
    ):
        layer(torch.zeros(1, 2))
    assert e.value.key == "model.compile"
    outer = RuntimeError("the step failed")
    outer.__cause__ = e.value.__cause__
    assert culprit(outer, list(AUTO_KEYS)) == "model.compile"
    begun, several = (SimpleNamespace(global_step=step, world_size=2 - step) for step in (1, 0))
    with pytest.raises(Exception, match="no code today") as e, naming_fast_path(choice, begun):
        layer(torch.zeros(1, 2))
    assert not isinstance(e.value, FastPathFailed | RunError)
    alike = "start again with model.compile=false, for all processes alike"
    with pytest.raises(RunError, match=alike), naming_fast_path(choice, several):
        layer(torch.zeros(1, 2))
    torch.compiler.reset()


@pytest.fixture
def capture_fails(monkeypatch):
    """CUDA graphs by choice or by order, on the CPU, where capturing fails."""

    def refuse(module):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(ImageClassifier, "graph_steps", refuse)
    monkeypatch.setattr("onlinenorm.training.trainer.torch.cuda.is_available", lambda: False)

    def pretend(fast):
        def chosen(config, open_data):
            config = with_values(config, {key: AUTO_KEYS[key] for key in fast_path.left_to_choose(config)})
            tried = fast and not tries
            tries.append(config)
            graphed = with_values(config, {"trainer.cuda_graph": True}) if tried or not fast else config
            return Choice(graphed, open_data(config), {}, ["trainer.cuda_graph"] if tried else [])

        monkeypatch.setattr(run_module, "choose", chosen)

    tries = []
    return pretend


def test_a_choice_that_fails_before_the_first_step_is_taken_back(run, tmp_path, capture_fails, capsys):
    run(tmp_path / "plain")
    capture_fails(fast=True)
    run(tmp_path / "fell_back")
    assert capsys.readouterr().err == (
        "trainer.cuda_graph: auto chose true, which failed before the first step (CUDA error: operation not permitted "
        "when stream is capturing); the run goes on with trainer.cuda_graph=false\n"
    )
    assert outcome(tmp_path / "fell_back") == outcome(tmp_path / "plain")
    assert yaml.safe_load((tmp_path / "fell_back" / "config.yaml").read_text())["trainer"]["cuda_graph"] is False
    assert not (tmp_path / "fell_back" / "failed.json").exists() and not (tmp_path / "fell_back" / "attempts").exists()
    assert len(json.loads((tmp_path / "fell_back" / "environment.json").read_text())["starts"]) == 1


def test_what_was_asked_for_fails_as_it_is(run, tmp_path, capture_fails):
    capture_fails(fast=False)
    with pytest.raises(RuntimeError, match="stream is capturing"):
        run(tmp_path)
