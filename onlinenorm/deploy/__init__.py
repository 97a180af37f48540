"""Trained networks outside the harness: loading a run, exporting it, auditing its clamps, predicting with it."""

from onlinenorm.deploy.forms import FORMS, load_folded
from onlinenorm.deploy.source import Trained, load_trained
from onlinenorm.errors import DeployError

__all__ = ["FORMS", "DeployError", "Trained", "load_folded", "load_trained"]
