"""Other projects' layers and checkpoints: those of Megatron-Core."""

from .megatron_checkpoint import gpt_names, read_megatron_checkpoint

__all__ = ["gpt_names", "read_megatron_checkpoint"]
