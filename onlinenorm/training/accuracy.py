"""The one rule of accuracy: the class of the largest logit in float32, of equal ones the lowest, is the prediction.

Logits that come in bfloat16 tie often; `topk` and `argmax` on them would not name the same class.
"""

import torch
from torch import Tensor

TOP1_RULE = "argmax of float32 logits, the lowest class of equal ones"  # named in results.json


def full_precision(logits: Tensor) -> Tensor:
    """Logits in float32, or in float64 where they come so."""
    return logits if logits.dtype == torch.float64 else logits.float()


def predicted(logits_NK: Tensor) -> Tensor:
    """The predicted class of each image."""
    return full_precision(logits_NK).argmax(1)


def ranked(logits_NK: Tensor, count: int) -> Tensor:
    """The first `count` classes of each image by falling logit; the first of them is the predicted one."""
    return full_precision(logits_NK).argsort(dim=1, descending=True, stable=True)[:, :count]


def rank(logits_NK: Tensor, labels_N: Tensor) -> Tensor:
    """How many classes come before each image's label: 0 exactly where the label is predicted; NaN comes first.

    Labels must be classes: 0 <= label < K.
    """
    logits_NK = full_precision(logits_NK)
    own_N1 = logits_NK.gather(1, labels_N[:, None])
    lower_NK = torch.arange(logits_NK.shape[1], device=logits_NK.device) < labels_N[:, None]
    return (~(logits_NK <= own_N1) | ((logits_NK == own_N1) & lower_NK)).sum(1)
