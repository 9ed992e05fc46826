"""The numbers that decide the training of the flow model. Knows nothing of networks or JAX."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class FlowRecipe:
    """The options of `python -m demo.train_flow`. Checkpoints belong to one recipe."""

    seed: int = 0
    architecture: str = "bundled"  # of flow_networks.ARCHITECTURES
    pool: int = 32_000
    steps: int = 9000
    batch: int = 32
    learning_rate: float = 2e-3
    ema: float = 0.999
    prompt_dropout: float = 0.1
    probe_weight: float = 0.3  # of telling what stands where, beside the flow's loss
    thing_weight: float = 3.0  # of a patch in which a thing stands, of one of the background
    shift: float = 1.8  # of the noise levels, towards noise
    warmup_steps: int = 100
    checkpoint_steps: int = 200


FLOW_STAGES = {"flow": "transformer and text encoder"}
