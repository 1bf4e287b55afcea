"""Other projects' checkpoints, read into pieces: those of Megatron-Core, without a pickle."""

from .megatron_checkpoint import gpt_names, read_megatron_checkpoint

__all__ = ["gpt_names", "read_megatron_checkpoint"]
