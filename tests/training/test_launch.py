"""How a process was started, told from its environment; a description of several processes is complete or refused."""

import os

import pytest
from pytorch_lightning.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment

from onlinenorm.errors import ConfigError
from onlinenorm.training.launch import RANKS, cluster_environment, is_child, is_rank_zero, launched
from onlinenorm.training.trainer import resolve

VARIABLES = (*RANKS, "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def started(monkeypatch):
    """started(NAME=value) sets a launcher's environment, alone."""

    def pretend(**environment):
        for name in list(os.environ):
            if name.startswith(("SLURM_", "TORCHELASTIC_")) or name in VARIABLES:
                monkeypatch.delenv(name)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

    before = dict(os.environ)
    yield pretend
    for name in set(os.environ) - set(before):  # what cluster_environment() has filled in
        del os.environ[name]


MEETING = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "RANK": "5", "LOCAL_RANK": "1", **MEETING
}  # fmt: skip
SRUN = {
    "SLURM_NTASKS": "6", "SLURM_STEP_NUM_TASKS": "6", "SLURM_STEP_NUM_NODES": "3", "SLURM_PROCID": "1",
    "SLURM_LOCALID": "1", "SLURM_NODEID": "0",
}  # fmt: skip
BY_HAND = {"RANK": "1", "WORLD_SIZE": "2", **MEETING}
CASES = [
    ({}, None, LightningEnvironment),
    (TORCHRUN, ("torchrun", 4, 2), TorchElasticEnvironment),
    (SRUN, ("srun", 2, 3), SLURMEnvironment),
    (SRUN | TORCHRUN, ("torchrun", 4, 2), TorchElasticEnvironment),  # torchrun within a job
    ({"SLURM_NTASKS": "6", "SLURM_PROCID": "0"}, None, LightningEnvironment),  # python in a batch script, without srun
    (BY_HAND, ("environment variables", 1, 2), TorchElasticEnvironment),  # a process a machine
    (
        BY_HAND | {"WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"},
        ("environment variables", 2, 2),
        TorchElasticEnvironment,
    ),
]


@pytest.mark.parametrize("environment, launch, kind", CASES)
def test_launchers_are_told_apart(started, environment, launch, kind):
    started(**environment)
    assert launched() == launch and type(cluster_environment()) is kind


def test_processes_are_those_that_were_started(started):
    started(**TORCHRUN)
    found = resolve({"accelerator": "cpu", "devices": "auto"})
    assert (found["devices"], found["num_nodes"], found["strategy"]) == (4, 2, "ddp")
    with pytest.raises(ConfigError, match=r"trainer.devices: 3 x 1 machine\(s\) asked for, torchrun has started 4 x 2"):
        resolve({"accelerator": "cpu", "devices": 3})
    with pytest.raises(ConfigError, match=r"trainer.devices: 1 x 1 .* use trainer=ddp"):
        resolve({"accelerator": "cpu"})


def test_variables_set_by_hand_make_several_processes(started):
    started(**BY_HAND)
    found = resolve({"accelerator": "cpu"})
    assert (found["devices"], found["num_nodes"], found["strategy"]) == (1, 2, "ddp")
    environment = cluster_environment()
    assert (environment.global_rank(), environment.local_rank(), environment.node_rank()) == (1, 0, 1)
    assert not is_rank_zero()


def test_leader(started):
    started()
    assert is_rank_zero()
    started(RANK="0")
    assert is_rank_zero()
    started(RANK="4", LOCAL_RANK="0")
    assert not is_rank_zero()
    started(**TORCHRUN)
    assert not is_rank_zero()
    # torchrun gives out ranks as machines come; that of SLURM says nothing then
    started(**(TORCHRUN | SRUN | {"RANK": "0", "LOCAL_RANK": "0"}))
    assert is_rank_zero()
    started(**(SRUN | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "RANK": "3"}))
    assert is_rank_zero()


LIGHTNING = {"LOCAL_RANK": "1", "NODE_RANK": "0", "WORLD_SIZE": "2", **MEETING}


@pytest.mark.parametrize(
    "environment, trainer, says",
    [
        ({"RANK": "1"}, {}, r"^RANK: 1 .* WORLD_SIZE, MASTER_ADDR, MASTER_PORT are missing; .*torchrun.* unset RANK$"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, {}, r"^RANK: 0 .* MASTER_ADDR, MASTER_PORT are missing"),
        ({"WORLD_SIZE": "2"}, {}, r"^WORLD_SIZE: 2 .* RANK, MASTER_ADDR, MASTER_PORT, .* missing"),
        (BY_HAND | {"LOCAL_RANK": "1"}, {}, r"^LOCAL_RANK: 1 with WORLD_SIZE=2 does not fit trainer.devices=1"),
        (BY_HAND | {"LOCAL_RANK": "0", "RANK": "0"}, {}, r"^WORLD_SIZE: 2 .* LOCAL_WORLD_SIZE is missing"),
        ({"NODE_RANK": "1"}, {}, r"^NODE_RANK: 1 .* trainer.num_nodes=2 or more is missing"),
        ({"NODE_RANK": "1"}, {"num_nodes": 2}, r"^NODE_RANK: 1 .* MASTER_ADDR, MASTER_PORT are missing"),
        ({"SLURM_PROCID": "1"}, {}, r"^SLURM_PROCID: 1 .* SLURM_STEP_NUM_TASKS is missing"),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}, {}, r"^SLURM_STEP_NUM_TASKS: 2 .* SLURM_LOCALID"),
        ({"LOCAL_RANK": "1"}, {}, r"^LOCAL_RANK: 1 .* WORLD_SIZE, MASTER_ADDR, MASTER_PORT are missing"),
        ({"LOCAL_RANK": "0"}, {"devices": 2}, r"^LOCAL_RANK: 0 .* WORLD_SIZE, MASTER_ADDR, MASTER_PORT are missing"),
        (LIGHTNING, {"devices": 1}, r"^LOCAL_RANK: 1 with WORLD_SIZE=2 does not fit trainer.devices=1"),
        ({"TORCHELASTIC_RUN_ID": "x", "RANK": "0"}, {}, r"^TORCHELASTIC_RUN_ID: x .* LOCAL_RANK, WORLD_SIZE"),
        ({"OMPI_COMM_WORLD_RANK": "1"}, {}, r"^OMPI_COMM_WORLD_RANK: 1 .* RANK, WORLD_SIZE"),
        ({"RANK": "one"}, {}, r"^RANK: 'one' in the environment is not a whole number"),
        (BY_HAND | {"RANK": "2"}, {}, r"^RANK: 2 is not one of WORLD_SIZE=2 processes, 0 to 1"),
        (BY_HAND | {"RANK": "-1"}, {}, r"^RANK: -1 is not one of WORLD_SIZE=2 processes, 0 to 1"),
        (TORCHRUN | {"LOCAL_RANK": "4"}, {}, r"^LOCAL_RANK: 4 is not one of LOCAL_WORLD_SIZE=4 processes"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "3"}, {}, r"^LOCAL_WORLD_SIZE: 3 of 8 processes are on this machine"),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "7"}, {"devices": "auto"}, r"^srun: 7 tasks on 3 nodes"),
    ],
)
def test_half_a_description_of_several_processes_is_refused(started, environment, trainer, says):
    started(**environment)
    with pytest.raises(ConfigError, match=says):
        resolve({"accelerator": "cpu", **trainer})


@pytest.mark.parametrize(
    "environment",
    [{name: "0"} for name in RANKS] + [MEETING, MEETING | {"RANK": "0", "WORLD_SIZE": "1"}, {"LOCAL_WORLD_SIZE": "1"}],
)
def test_leftovers_run_alone_with_the_lock(started, environment):
    started(**environment)
    found = resolve({"accelerator": "cpu"})
    assert (found["devices"], found["num_nodes"], found["strategy"]) == (1, 1, "auto")
    assert is_rank_zero() and not is_child()


def test_processes_of_lightnings_launcher(started):
    started(**LIGHTNING)
    assert resolve({"accelerator": "cpu", "devices": 2})["devices"] == 2
    assert not is_rank_zero() and is_child()
    started(**(LIGHTNING | {"RANK": "1"}))
    assert resolve({"accelerator": "cpu", "devices": 2})["devices"] == 2
    started(NODE_RANK="1", **MEETING)
    assert resolve({"accelerator": "cpu", "num_nodes": 2})["strategy"] == "ddp"
    assert not is_rank_zero() and not is_child()


def test_zeros_are_not_handed_on_to_started_processes(started):
    started(RANK="0", SLURM_PROCID="0")
    resolve({"accelerator": "cpu", "devices": 2})
    assert not {"RANK", "SLURM_PROCID"} & set(os.environ)
