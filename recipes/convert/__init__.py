"""Other formats: GGUF files become Hugging Face folders, Megatron-Core checkpoints pieces.

No pickle is loaded.
"""

from .megatron_checkpoint import gpt_names, read_megatron_checkpoint

__all__ = ["gpt_names", "read_megatron_checkpoint"]
