"""Small flat-style scenes: what the demo model learns to draw. Knows nothing of models, training or JAX.

`sample_scene` invents a scene, `draw` paints it, `caption` describes it in words of `vocabulary`, and `check` judges
whether a picture, generated ones above all, shows it.
"""

from demo.scenes.captions import caption, vocabulary
from demo.scenes.colours import COLOURS
from demo.scenes.drawing import Pixels, draw
from demo.scenes.judging import Verdict, check, judge
from demo.scenes.recognition import Seen, look
from demo.scenes.scene import (
    BACKGROUNDS,
    INVERSE,
    PLACES,
    SIZES,
    Scene,
    Split,
    Thing,
    held_out_pair,
    held_out_triple,
    sample_scene,
)
from demo.scenes.shapes import KINDS

__all__ = [
    "BACKGROUNDS",
    "COLOURS",
    "INVERSE",
    "KINDS",
    "PLACES",
    "SIZES",
    "Pixels",
    "Scene",
    "Seen",
    "Split",
    "Thing",
    "Verdict",
    "caption",
    "check",
    "draw",
    "held_out_pair",
    "held_out_triple",
    "judge",
    "look",
    "sample_scene",
    "vocabulary",
]
