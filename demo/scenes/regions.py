"""Connected regions of a picture, as boolean masks. Knows nothing of scenes."""

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]


def grow(mask: Mask) -> Mask:
    padded = np.pad(mask, 1)
    height, width = mask.shape
    shifted = [padded[y : y + height, x : x + width] for y in range(3) for x in range(3)]
    return np.asarray(np.logical_or.reduce(shifted), bool)


def shrink(mask: Mask) -> Mask:
    return ~grow(~mask)


def components(mask: Mask) -> list[Mask]:
    """The connected regions of a mask: the largest label of each region spreads until nothing changes."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        padded = np.pad(labels, 1)
        across = np.maximum(np.maximum(padded[:, :-2], padded[:, 1:-1]), padded[:, 2:])
        spread = np.maximum(np.maximum(across[:-2], across[1:-1]), across[2:]) * mask
        if np.array_equal(spread, labels):
            return [labels == label for label in np.unique(labels[mask])]
        labels = spread


def split(region: Mask, first: Mask, second: Mask) -> list[Mask]:
    """Divides a region between two seeds in it: each pixel goes to the seed that reaches it first."""
    while True:
        wider = first | (grow(first) & region & ~second)
        second_wider = second | (grow(second) & region & ~wider)
        if np.array_equal(wider, first) and np.array_equal(second_wider, second):
            return [first, second]
        first, second = wider, second_wider
