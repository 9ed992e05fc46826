"""Everything that this project uses of Ray and that Ray keeps private, as it was seen in Ray 2.60.0.

Three modules, because their imports cost differently: `core` nothing beyond `import ray` (0.4 s), `autoscaler` 0.04 s
more, and `serve` 0.7 s more, which not every Ray worker should pay. This module imports none of them.

No other module may name a private module of Ray. tests/test_ray_internals.py holds that, and that each name works.
"""

RAY_VERSION = "2.60.0"  # before another one is pinned, look at everything in this package
