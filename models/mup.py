"""The maximal-update parametrisation (muP): hyper-parameters that hold at every width.

m = width / base width. Under Adam, where K is the head dimension:

                  embedding, norms, biases    hidden matrices    routers    head     scores
    initial std   1                           1 / sqrt(m)        1 / m      0
    learning rate 1                           1 / m              1 / m      1
    multiplier                                                              1 / m    8 / K

The decoupled decay of what learns 1 / m as fast is m times as strong, so that the product is the
same at every width. A head of its own starts at 0, as the authors recommend: what it is drawn as
would shrink with the width. A tied one is the embedding.

Source: Yang et al. 2022, https://arxiv.org/abs/2203.03466, tables 3 and 8, and appendix B.1.
"""

import math
from collections.abc import Callable

from torch import Tensor

from .architecture import Architecture


def is_hidden(path: str, parameter: Tensor) -> bool:
    """Whether a parameter of a decoder is a hidden matrix, as Muon takes them: of a block."""
    return path.startswith("blocks.") and parameter.dim() == 2


def initial_scale(a: Architecture, path: str, parameter: Tensor) -> float:
    """Return what the standard deviation of a parameter's first values is multiplied by."""
    if path == "head.weight":
        return 0.0 if a.mup_base else 1.0
    if not is_hidden(path, parameter):
        return 1.0
    by_router, by_matrix = 1 / a.multiple, 1 / math.sqrt(a.multiple)
    return by_router if path.endswith("router.weight") else by_matrix


def learning_rates(a: Architecture) -> Callable[[str, Tensor], float]:
    """Return what a parameter's learning rate is multiplied by, given path and parameter."""
    return lambda path, parameter: 1 / a.multiple if is_hidden(path, parameter) else 1.0
