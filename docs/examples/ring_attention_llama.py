"""Ring attention inside a Llama of `transformers`: one sequence, on many ranks.

    torchrun --nproc-per-node 2 docs/examples/ring_attention_llama.py

Attention is the one operator of a Llama that mixes tokens, and `transformers` lets it be replaced
by name. All else runs on a rank's own tokens as it is, told three things: which tokens these are,
at which positions, and that a target is the token after its own, which may be on another rank, so
that the targets are cut from the shifted sequence, not shifted after the cut.

    split            who holds which tokens; zigzag, so that causal work is even
    position_ids     `split.positions(rank)`, else rotary embeddings count from 0 on every rank
    gradients        every parameter has seen S/R of the tokens: sum all of them over the group

The mask stays out: for a name that has none of its own `transformers` makes no mask, and the
attention here is causal by itself. Rows are of one length; pack documents of different lengths
into one row and give the split their lengths.
"""

import os
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

from warploom.parallel.context import Split, ring_attention, shard_sequence, unshard

ROWS, LENGTH, VOCABULARY = 2, 16, 50


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    split: Split,
    group: dist.ProcessGroup | None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend as `transformers` asks: heads before tokens in, tokens before heads out."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return ring_attention(q, k, v, split, group=group, scale=scaling), None


def build(kind: str) -> LlamaForCausalLM:
    """Return a tiny Llama in float64 with grouped key heads, the same for each kind."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"num_hidden_layers": 2, "intermediate_size": 48, "vocab_size": VOCABULARY}
    return LlamaForCausalLM(LlamaConfig(**sizes, attn_implementation=kind)).double()


def run(group: dist.ProcessGroup | None) -> dict[str, float]:
    """Compare logits and every gradient with the plain model on the whole sequence."""
    AttentionInterface.register("warploom_ring", attend)
    whole, ours = build("sdpa"), build("warploom_ring")
    tokens = torch.randint(VOCABULARY, (ROWS, LENGTH + 1))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    logits = whole(inputs).logits
    F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()

    ranks, rank = (1, 0) if group is None else (group.size(), group.rank())
    split = Split.build([LENGTH] * ROWS, ranks, rows=ROWS)
    own = [shard_sequence(x.contiguous(), split, rank) for x in (inputs, targets)]
    positions = split.positions(rank).view(ROWS, -1)
    # what the model does not know it hands on to the attention: the split needs no global
    mine = ours(own[0], position_ids=positions, use_cache=False, split=split, group=group).logits
    total = F.cross_entropy(mine.flatten(0, 1), own[1].flatten(), reduction="sum")
    (total / targets.numel()).backward()
    if group is not None:
        for parameter in ours.parameters():
            dist.all_reduce(parameter.grad, group=group)
    mine = unshard(mine.detach(), split, group=group)
    found = {"logits": float((mine - logits.detach()).abs().max())}
    for (name, a), (_, b) in zip(ours.named_parameters(), whole.named_parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        found[f"d {name}"] = float((a.grad - b.grad).abs().max())
    return found


if __name__ == "__main__":
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    for name, difference in run(dist.group.WORLD if dist.is_initialized() else None).items():
        print(f"{name:48} differs by {difference:.1e}")
