"""AutoencoderKLFlux2: AutoencoderKL behind patches of 2x2 latents with unit variance. Names are diffusers' tensors'."""

import jax
import jax.numpy as jnp
from flax import nnx

from app.diffusion.models.flow_config import Flux2VAEConfig
from app.diffusion.models.layers import Dtype
from app.diffusion.models.strips import WHOLE, Strips
from app.diffusion.models.vae import VAE


class Statistics(nnx.Module):
    """A batch norm's running mean and variance of each channel, in float32: nothing is learned here."""

    def __init__(self, channels: int):
        self.running_mean = nnx.Param(jnp.zeros(channels))
        self.running_var = nnx.Param(jnp.ones(channels))


class Flux2VAE(VAE):
    def __init__(self, config: Flux2VAEConfig, *, dtype: Dtype = jnp.float32, rngs: nnx.Rngs):
        super().__init__(config, dtype=dtype, rngs=rngs)
        self.epsilon = config.batch_norm_eps
        self.bn = Statistics(config.patch_channels)

    def statistics(self) -> tuple[jax.Array, jax.Array]:
        """The mean [4 * C] and the deviation [4 * C] of patches."""
        return self.bn.running_mean[...], jnp.sqrt(self.bn.running_var[...] + self.epsilon)

    def posterior(self, pixels: jax.Array, *, strips: Strips = WHOLE) -> tuple[jax.Array, jax.Array]:
        """Pixels [B, 16 * h, 16 * w, 3] in [-1, 1] -> mean [B, h, w, 4 * C] of latents as the denoiser knows them.

        The deviation is zero: FLUX.2's pipelines take the mean of the posterior.
        """
        latents, _ = self.encode(pixels, strips=strips)
        mean, deviation = self.statistics()
        latents = (to_patches(latents).astype(jnp.float32) - mean[None, None, None]) / deviation[None, None, None]
        return latents, jnp.zeros_like(latents)

    def decode(self, latents: jax.Array, *, strips: Strips = WHOLE) -> jax.Array:
        """Latents [B, h, w, 4 * C] as the denoiser knows them -> pixels [B, 16 * h, 16 * w, 3] around [-1, 1]."""
        mean, deviation = self.statistics()
        latents = latents * deviation[None, None, None] + mean[None, None, None]
        return super().decode(from_patches(latents), strips=strips)


def to_patches(x: jax.Array) -> jax.Array:
    """[B, 2 * h, 2 * w, C] -> [B, h, w, 4 * C], channels outermost."""
    rows, height, width, channels = x.shape
    x = x.reshape(rows, height // 2, 2, width // 2, 2, channels).transpose(0, 1, 3, 5, 2, 4)
    return x.reshape(rows, height // 2, width // 2, 4 * channels)


def from_patches(x: jax.Array) -> jax.Array:
    """[B, h, w, 4 * C], channels outermost -> [B, 2 * h, 2 * w, C]."""
    rows, height, width, channels = x.shape
    x = x.reshape(rows, height, width, channels // 4, 2, 2).transpose(0, 1, 4, 2, 5, 3)
    return x.reshape(rows, 2 * height, 2 * width, channels // 4)
