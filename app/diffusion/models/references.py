"""Reference images as tokens of a denoiser: what a slot holds of them. Needs no JAX, and knows no network."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt


class References(NamedTuple):
    """The images that a picture looks at, as tokens one behind the other, and padding. Leading axes: rows or slots."""

    latents: Any  # float32 [T, C]
    positions: Any  # int32 [T, 3], the image's number from 1, row and column; zeros for padding
    length: Any  # int32 [], how many of the tokens are of images


def positions_of(grids: Sequence[tuple[int, int]], tokens: int) -> npt.NDArray[np.int32]:
    """[T, 3] for images of so many rows and columns of latents, which `tokens` hold."""
    positions, at = np.zeros((tokens, 3), np.int32), 0
    for number, (rows, columns) in enumerate(grids, 1):
        image = positions[at : at + rows * columns]
        image[:, 0] = number
        image[:, 1:] = np.indices((rows, columns)).reshape(2, -1).T
        at += rows * columns
    return positions
