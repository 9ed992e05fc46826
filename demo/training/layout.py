"""What stands where in a picture, as classes of the cells of a grid: what networks are taught to tell on their way."""

import numpy as np

from demo import scenes

_KINDS, _COLOURS, _BACKGROUNDS = [*scenes.KINDS], [*scenes.COLOURS], [*scenes.BACKGROUNDS]
CELL_CLASSES = (len(_KINDS) + 1, len(_COLOURS) + 1)  # of a cell's thing and of its colour; 0 is none
BACKGROUNDS = len(_BACKGROUNDS)


def layout(scene: scenes.Scene, grid: int) -> np.ndarray:
    """int32 [1 + 2 * grid ** 2]: the background, the thing in each cell, row by row, and its colour."""
    cells = grid**2
    labels = np.zeros(1 + 2 * cells, np.int32)
    labels[0] = _BACKGROUNDS.index(scene.background)
    for thing in scene.things:
        where = covered(thing, grid)
        labels[1 : 1 + cells][where] = _KINDS.index(thing.kind) + 1
        labels[1 + cells :][where] = _COLOURS.index(thing.colour) + 1
    return labels


def covered(thing: scenes.Thing, grid: int) -> np.ndarray:
    """For each cell of the grid, row by row, whether its centre is within the thing's square."""
    centres = (np.arange(grid) + 0.5) / grid
    across, down = (np.abs(centres - middle) < thing.size / 2 for middle in (thing.x, thing.y))
    return (down[:, None] & across[None]).ravel()
