"""A model behind HTTP, as OpenAI's clients speak it: `warploom serve`."""
