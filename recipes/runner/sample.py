"""Text from a model, one full forward pass a token: enough for a look, no engine."""

from collections.abc import Sequence

import torch

from warploom.models.decoder import Decoder
from warploom.parallel.mesh import Mesh

from .forward import logits


@torch.no_grad()
def continue_ids(
    model: Decoder,
    ids: Sequence[int],
    *,
    count: int,
    vocabulary: int,
    temperature: float = 0.0,
    seed: int = 0,
    stop: int | None = None,
) -> list[int]:
    """Continue a sequence; every rank of the model's group calls it and gets the same.

    Args:
        model: The model.
        ids: The beginning, at least one id.
        count: Most tokens to add.
        vocabulary: Ids of the tokenizer; rows of the head behind them are never drawn.
        temperature: Divides the logits; 0 takes the likeliest token.
        seed: Of the draws.
        stop: Id that ends the text; it is not returned.

    Returns:
        The new ids.
    """
    device = next(model.parameters()).device
    mesh = model.mesh or Mesh.alone()
    draws = torch.Generator().manual_seed(seed)
    longest = model.architecture.max_positions
    text = list(ids)
    for _ in range(count):
        window = torch.tensor([text[-longest:]], device=device)
        last = logits(model, window, mesh)[0, -1, :vocabulary].double().cpu()
        if temperature > 0:
            chances = torch.softmax(last / temperature, dim=-1)
            drawn = int(torch.multinomial(chances, 1, generator=draws))
        else:
            drawn = int(last.argmax())
        if drawn == stop:
            break
        text.append(drawn)
    return text[len(ids) :]
