"""The numbers that decide a training. Knows nothing of networks or JAX."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The options of `python -m demo.train`. Checkpoints belong to one recipe; the model card repeats it."""

    seed: int = 0
    architecture: str = "bundled"  # of networks.ARCHITECTURES
    vae_steps: int = 3000
    vae_batch: int = 4
    vae_learning_rate: float = 8e-4
    vae_ema: float = 0.995
    vae_kl_weight: float = 3e-5
    pool: int = 20_000
    text_steps: int = 3000
    text_batch: int = 64
    text_learning_rate: float = 1e-3
    unet_steps: int = 7000
    unet_batch: int = 64
    unet_learning_rate: float = 1e-3
    unet_ema: float = 0.998
    prompt_dropout: float = 0.1
    decoder_steps: int = 3000
    decoder_learning_rate: float = 8e-4
    decoder_noise: float = 0.5  # largest standard deviation; that of the latents is 2
    warmup_steps: int = 100
    checkpoint_steps: int = 200


STAGES = {"vae": "VAE", "text": "text encoder", "unet": "UNet and text encoder", "decoder": "decoder, sharpened"}
