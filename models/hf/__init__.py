"""Hugging Face folders (config.json, safetensors, tokenizer) in and out, tensor by tensor.

`load` reads on each rank only the slices that it holds, straight into the parameters where dtype
and layout allow it. `save` puts the logical tensors together one at a time, reads what it has
written, and gives the folder its name when it is whole, or not at all.
"""

from .loading import load, load_into
from .saving import save
from .texts import architecture

__all__ = ["architecture", "load", "load_into", "save"]
