"""The DeepSeek-V3 family: V2 with a sigmoid router whose bias balances, and tokens further ahead.

A group is chosen by its two best experts. The bias `e_score_correction_bias` is part of a folder,
and moves while training by 0.001 a step unless another rate is given; 0 keeps it where it is.
The blocks that predict further tokens are numbered after the others; `transformers` passes them by.
As published the projections are in FP8.

Source: DeepSeek-AI 2024, https://arxiv.org/abs/2412.19437, sections 2 and 4.2.
"""

from dataclasses import replace
from typing import Any

from ..architecture import Architecture, Experts
from . import deepseek_v2 as v2
from .family import Family

_LAYER = "model.layers.*"

FAMILY = Family(
    model_type="deepseek_v3",
    class_name="DeepseekV3ForCausalLM",
    fields={
        **v2.FIELDS,
        "n_group": "experts.groups",
        "topk_group": "experts.top_groups",
        "norm_topk_prob": "experts.normalise",
        "num_nextn_predict_layers": "predict",
    },
    names={
        **v2.NAMES,
        "blocks.*.embedding_norm": f"{_LAYER}.enorm",
        "blocks.*.hidden_norm": f"{_LAYER}.hnorm",
        "blocks.*.project": f"{_LAYER}.eh_proj",
        "blocks.*.norm": f"{_LAYER}.shared_head.norm",
    },
    defaults={
        **v2.DEFAULTS,
        "max_position_embeddings": 4096,
        "n_group": 8,
        "topk_group": 4,
        "norm_topk_prob": True,
        "num_nextn_predict_layers": 0,
        "routed_scaling_factor": 2.5,
        "first_k_dense_replace": 3,
    },
    always={"experts.score": "sigmoid", "experts.bias_rate": 0.001},
    fixed={
        **v2.FIXED,
        "rope_interleave": ((True,), "the halves of a head would rotate together"),
        "scoring_func": (("sigmoid",), "logits would become weights in another way"),
        "topk_method": (("noaux_tc",), "experts would be chosen in another way"),
    },
    ignored=v2.IGNORED,
    read=v2.read,
    write=v2.write,
    skipped=(".rotary_emb.inv_freq", ".embed_tokens.weight", ".shared_head.head.weight"),
)


def tiny() -> Architecture:
    """Return the tiny DeepSeek-V2 with a sigmoid router and one further token."""
    made = v2.tiny()
    experts = Experts(
        count=8, top_k=3, hidden=24, shared=24, dense_layers=1, score="sigmoid", scale=2.5,
        groups=4, top_groups=2, balance=0.001, bias_rate=0.001,
    )  # fmt: skip
    made = replace(made, experts=experts, predict=1)
    return v2.with_yarn(made, factor=8.0, original=64, mscale=1.0, mscale_all_dim=1.0)


def deepseek_v3() -> Architecture:
    """Return DeepSeek-V3: 671,026,404,352 parameters, 37.6 billion of them for a token.

    Beside them the routers' biases, 256 a block (671,026,419,200 with them), and 11,610,067,968
    parameters that predict one further token. The Hub's folder has embedding and head twice.
    """
    experts = Experts(
        count=256, top_k=8, hidden=2048, shared=2048, dense_layers=3, score="sigmoid", scale=2.5,
        groups=8, top_groups=4, balance=0.0001, bias_rate=0.001,
    )  # fmt: skip
    sizes: dict[str, Any] = {"layers": 61, "width": 7168, "hidden": 18432, "vocabulary": 129_280}
    made = replace(v2.deepseek_v2(), **sizes, experts=experts, predict=1)
    return v2.with_yarn(made, factor=40.0, original=4096, mscale=1.0, mscale_all_dim=1.0)
