"""Texts on their way through the text encoders: tokenized, padded to whole dispatches, and what becomes of each.

Dispatches through the function that it is given. Knows nothing of weights and programs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from app.diffusion.models.tokenizer import Tokenizer


@dataclass(frozen=True)
class Encoded:
    """What a text adds to the conditioning, and whether it was too long for a text encoder."""

    conditioning: Any  # the family's pytree of arrays, without leading axes
    truncated: bool
    empty: bool = False


def encoded_texts(
    texts: Sequence[str],
    tokenizers: Mapping[str, Tokenizer],
    encode: Callable[[Mapping[str, np.ndarray], int], Sequence[Any]],
    together: int,
) -> list[Encoded]:
    """`together` texts go into a dispatch. `encode` takes their input_ids, int32 [together, T] by tokenizer, and how
    many of the rows are texts; it returns a conditioning for each row."""
    tokens = {name: tokenizer(list(texts)) for name, tokenizer in tokenizers.items()}
    conditionings: list[Any] = []
    for first in range(0, len(texts), together):
        count = min(together, len(texts) - first)
        input_ids = {}
        for name, read in tokens.items():
            input_ids[name] = np.zeros((together, read.input_ids.shape[1]), np.int32)
            input_ids[name][:count] = read.input_ids[first : first + count]
        conditionings += encode(input_ids, count)[:count]
    truncated = map(any, zip(*(read.truncated for read in tokens.values()), strict=True))
    empty = (not text for text in texts)
    return [Encoded(*text) for text in zip(conditionings, truncated, empty, strict=True)]
