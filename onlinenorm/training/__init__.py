"""Training: recipe rules, the Lightning modules and what a run leaves behind."""

from onlinenorm.training.module import ImageClassifier
from onlinenorm.training.trainer import build_trainer

__all__ = ["ImageClassifier", "build_trainer"]
