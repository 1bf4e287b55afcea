"""Expert parallelism: mixture-of-experts layers whose experts are spread over ranks.

    layer = MoE(width, hidden, experts, top_k, group=mesh.ep, etp_group=mesh.etp, tp_group=mesh.tp)
    y, losses = layer(x, documents, count)
    update_biases(model, 1e-3, mesh.tp, mesh.tokens)      # after a step, where there is a bias

`layer` puts it together; `router` chooses, balances and limits; `dispatch` sends tokens there and
back; `experts` holds the weights; `replay` forces an earlier choice.
"""

from .experts import Experts
from .layer import MoE
from .replay import record_routing, replay_routing
from .router import Router, bias_entries, update_biases

__all__ = [
    "Experts", "MoE", "Router", "bias_entries", "record_routing", "replay_routing", "update_biases",
]  # fmt: skip
