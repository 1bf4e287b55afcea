"""Pretrain a language model on text, from random weights to a report and Hugging Face weights.

    torchrun --nproc-per-node 2 recipes/pretrain.py stdlib          two processes, CPU, minutes
    warploom train pretrain/stdlib --steps 50                       the same on one process
    torchrun --nproc-per-node 8 recipes/pretrain.py llama3-8b --corpus.paths /data/text

The same command goes on where it was stopped; another run needs another --folder.
"""

import sys
import sysconfig
from pathlib import Path

import torch

from warploom.models.decoder import Architecture
from warploom.models.families import llama
from warploom.recipes.runner.launch import main as launch
from warploom.recipes.runner.learning_rate import WSD, Cosine
from warploom.recipes.runner.run import AdamW, Corpus, Muon, Run


def stdlib() -> Run:
    """Train a few million parameters on the sources of Python's standard library, in minutes."""
    return Run(
        architecture=Architecture(
            layers=4,
            width=192,
            heads=3,
            kv_heads=3,
            head_dim=64,
            hidden=512,
            vocabulary=2048,
            max_positions=1024,
            qk_norm="head",
        ),
        corpus=Corpus(paths=("stdlib",), held_out=0.1),
        optimizer=Muon(rest_rate=3.0),
        learning_rate=0.005,
        schedule=WSD(warmup=20, decay=0.4, shape="linear"),
        batch_tokens=4096,
        micro_batch=8,
        sequence=256,
        steps=500,
        # without AVX-512 BF16 or AMX a processor multiplies bf16 some 50 times slower than float32
        precision="bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "float32",
        folder="runs/stdlib",
        checkpoint_every=100,
        evaluate_every=200,
    )


def stdlib_smoke() -> Run:
    """Take ten steps of a tiny model on one package of that library, to see that all works."""
    package = str(Path(sysconfig.get_path("stdlib"), "asyncio"))
    return Run(
        architecture=Architecture(
            layers=2,
            width=64,
            heads=4,
            kv_heads=2,
            head_dim=16,
            hidden=160,
            vocabulary=512,
            max_positions=128,
        ),
        corpus=Corpus(paths=(package,), suffixes=(".py",), held_out=0.2),
        learning_rate=3e-3,
        schedule=Cosine(warmup=2),
        batch_tokens=2048,
        micro_batch=4,
        sequence=128,
        steps=10,
        folder="runs/stdlib-smoke",
        checkpoint_every=5,
        evaluate_every=10,
        evaluate_tokens=16_384,
        log_every=1,
        sample_tokens=16,
    )


def smollm2_135m() -> Run:
    """Train the shape of SmolLM2 135M on text that you name; unproven until a GPU has run it."""
    return Run(
        architecture=llama.smollm2_135m(),
        corpus=Corpus(paths=("text",), held_out=0.001),
        optimizer=AdamW(),
        learning_rate=3e-3,
        schedule=WSD(warmup=2000),
        batch_tokens=1_048_576,
        micro_batch=8,
        sequence=2048,
        steps=100_000,
        precision="bf16",
        folder="runs/smollm2-135m",
        checkpoint_every=1000,
        evaluate_every=1000,
    )


def llama3_8b() -> Run:
    """Train the shape of Llama 3 8B on 8 GPUs of 80 GiB; unproven until GPUs have run it."""
    return Run(
        architecture=llama.llama3_8b(),
        corpus=Corpus(paths=("text",), held_out=0.001),
        mesh="tp2,dp4",
        optimizer=AdamW(),
        learning_rate=3e-4,
        schedule=Cosine(warmup=2000),
        batch_tokens=1_048_576,
        micro_batch=1,
        sequence=8192,
        steps=100_000,
        precision="bf16",
        recompute="full",
        folder="runs/llama3-8b",
        checkpoint_every=500,
        evaluate_every=500,
    )


RUNS = {
    "stdlib": stdlib,
    "stdlib-smoke": stdlib_smoke,
    "smollm2-135m": smollm2_135m,
    "llama3-8b": llama3_8b,
}


def main(argv: list[str] | None = None) -> int:
    """Train the run that the words name, with what they override, and return the exit code."""
    return launch(argv, RUNS, __doc__ or "", prog="pretrain")


if __name__ == "__main__":
    sys.exit(main())
