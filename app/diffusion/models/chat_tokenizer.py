"""The tokenizer of a chat model as a text encoder: a prompt becomes a user's message in the model's own template."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from app.diffusion.models.errors import one_line
from app.diffusion.models.tokenizer import Tokens
from app.diffusion.models.tokenizer_files import beyond


class ChatTokenizer:
    """Qwen2Tokenizer. `thinking`: the answer may begin with thoughts; otherwise the template ends with empty ones.

    Padding is stored as the complement of its id, so the length of a text is the number of its ids from 0.
    """

    def __init__(self, folder: Path, length: int, *, thinking: bool):
        from transformers import Qwen2Tokenizer  # takes a second: only a replica pays it

        try:
            self.tokenizer: Any = Qwen2Tokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:
            raise ValueError(f"the tokenizer in {folder} cannot be loaded: {one_line(error)}") from error
        self.length, self.thinking = length, thinking

    def problems(self, rows: int) -> Iterator[str]:
        """Compares the tokenizer that transformers made with a text encoder of so many rows."""
        yield from beyond(self.tokenizer.get_vocab(), rows)
        if self.tokenizer.chat_template is None:
            yield "tokenizer: it has no chat template, so a prompt cannot become a message."
        if self.tokenizer.pad_token_id is None:
            yield "tokenizer: it has no padding token."

    def message(self, text: str) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                [{"role": "user", "content": text}],
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=self.thinking,
            )
        )

    def __call__(self, texts: list[str]) -> Tokens:
        """As in diffusers, a long text loses the end of its message with its last words."""
        messages = [self.message(text) for text in texts]
        encoded = self.tokenizer(messages, padding="do_not_pad", truncation=False, verbose=False)["input_ids"]
        rows = np.full((len(texts), self.length), ~self.tokenizer.pad_token_id, np.int32)
        for row, ids in zip(rows, encoded, strict=True):
            row[: min(len(ids), self.length)] = ids[: self.length]
        return Tokens(rows, tuple(len(ids) > self.length for ids in encoded))
