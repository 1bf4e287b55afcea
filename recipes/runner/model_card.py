"""The model card: README.md beside exported weights, with what a reader must know to judge them."""

from collections.abc import Mapping
from typing import Any


def card(facts: Mapping[str, Any]) -> str:
    """Write the card of a finished run.

    Args:
        facts: What `finish.measure` collected.
    """
    run, corpus, held = facts["run"], facts["corpus"], facts["held_out"]
    sizes = run["architecture"]
    sources = ", ".join(path.rstrip("/").rpartition("/")[2] for path in corpus["paths"])
    about = {"stdlib": "the sources of Python's standard library"}.get(sources, sources)
    name = facts["folder"].rstrip("/").rpartition("/")[2]
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [warploom]
---

# {name}

A decoder-only language model of {facts["parameters"]["total"]:,} parameters: {sizes["layers"]}
layers, width {sizes["width"]}, {sizes["heads"]} heads over {sizes["kv_heads"]} key/value heads,
a vocabulary of {sizes["vocabulary"]:,}. Trained from {_start(run)} by warploom; not
aligned, not filtered, not tested for any use.

## Data

Text from {about}. To train on: {_split(corpus["train"])}.
Held out, chosen by a hash of their names: {_split(corpus["held_out"])}.
The model saw {facts["tokens"]:,} tokens, {corpus["epochs"]:.2f} times the training text.

## Training

{facts["steps"]:,} steps of {run["batch_tokens"]:,} tokens in sequences of {run["sequence"]:,};
{run["optimizer"]["kind"]} at a peak learning rate of {run["learning_rate"]:g}; {_precision(run)};
seed {run["seed"]}. {facts["flops"]["run"]:.3g} FLOPs, {facts["flops"]["formula"]}.

## Evaluation

On {held["tokens"]:,} held-out tokens ({held["bytes"]:,} bytes): {held["nats_per_token"]:.4f} nats
a token, {held["bits_per_byte"]:.4f} bits a byte.

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
```
"""


def _start(run: Mapping[str, Any]) -> str:
    folder = str(run.get("weights") or "").rstrip("/")
    return f"the weights of {folder.rpartition('/')[2]}" if folder else "random weights"


def _precision(run: Mapping[str, Any]) -> str:
    fp8 = run.get("fp8")
    return str(run["precision"]) + (f" with FP8 projections ({fp8} scales)" if fp8 else "")


def _split(split: Mapping[str, int]) -> str:
    return f"{split['documents']:,} documents, {split['bytes']:,} bytes, {split['tokens']:,} tokens"
