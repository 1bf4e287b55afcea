"""The special tokens that every tokenizer trained here reserves, in the order of their ids.

They take the last ids of the vocabulary. The list is frozen: a checkpoint's embedding rows depend
on it, so a new meaning takes one of the reserved names and the list never changes its length.
Text never produces one of them, whatever it spells; code adds them by id.
"""

BOS = "<|bos|>"
EOS = "<|eos|>"
PAD = "<|pad|>"

SPECIAL_TOKENS: tuple[str, ...] = (
    BOS,  # before every document
    EOS,  # after every document
    PAD,  # fills a row that holds nothing; never trained, never equal to EOS
    "<|system|>",  # opens a turn of a conversation, by role
    "<|user|>",
    "<|assistant|>",
    "<|tool|>",
    "<|end_of_turn|>",  # closes a turn; an assistant's is trained, so that it learns to stop
    "<|tool_call|>",  # a call inside an assistant's turn, and its end
    "<|tool_call_end|>",
    "<|tool_result|>",  # what the tool said, and its end
    "<|tool_result_end|>",
    "<|think|>",  # reasoning that is not shown, and its end
    "<|think_end|>",
    "<|prefix|>",  # fill in the middle: what precedes, what is missing, what follows
    "<|middle|>",
    "<|suffix|>",
    *(f"<|reserved_{i}|>" for i in range(7)),
)
