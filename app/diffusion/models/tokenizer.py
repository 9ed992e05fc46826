"""CLIP's tokenizer: text -> input_ids of a fixed length. Only it and chat_tokenizer.py use `transformers`."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from app.diffusion.models.errors import one_line
from app.diffusion.models.tokenizer_files import beyond


@dataclasses.dataclass(frozen=True)
class Tokens:
    """input_ids int32 [B, T], and for each text whether something was cut off to make it fit."""

    input_ids: np.ndarray
    truncated: tuple[bool, ...]


class Tokenizer:
    """`length` is the text encoder's number of positions: 77 for Stable Diffusion.

    `padding` is the token behind a short text; None: the one that the tokenizer's files name. transformers reads the
    padding token in a text as that token too, as it does for OpenCLIP's "!".
    """

    def __init__(self, folder: Path, length: int, padding: str | None = None):
        from transformers import CLIPTokenizer  # takes a second: only a replica pays it

        options: dict[str, Any] = {} if padding is None else {"pad_token": padding}
        try:
            self.tokenizer: Any = CLIPTokenizer.from_pretrained(folder, local_files_only=True, **options)
        except Exception as error:
            raise ValueError(f"the tokenizer in {folder} cannot be loaded: {one_line(error)}") from error
        self.name, self.length = folder.name, length

    def problems(self, rows: int) -> Iterator[str]:
        """Compares the tokenizer that transformers made with a text encoder of so many rows.

        transformers may add tokens, such as a padding token that the vocabulary lacks.
        """
        yield from beyond(self.tokenizer.get_vocab(), rows, self.name)
        empty, ends = self.tokenizer("")["input_ids"], [self.tokenizer.bos_token_id, self.tokenizer.eos_token_id]
        if empty != ends:
            yield f"{self.name}: an empty prompt must become the begin and the end token {ends}, got {empty}."

    def __call__(self, texts: list[str]) -> Tokens:
        encoded = self.tokenizer(texts, padding="do_not_pad", truncation=False, verbose=False)["input_ids"]
        rows = np.full((len(texts), self.length), self.tokenizer.pad_token_id, np.int32)
        for row, ids in zip(rows, encoded, strict=True):
            kept = ids if len(ids) <= self.length else [*ids[: self.length - 1], ids[-1]]  # the end token stays
            row[: len(kept)] = kept
        return Tokens(rows, tuple(len(ids) > self.length for ids in encoded))
