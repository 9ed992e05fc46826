"""Measures what decoding in bfloat16 loses against float32, with the demo model's VAE and pictures of its scenes.

python -m benchmarks.vae_dtype    # about a minute
"""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from app.diffusion.device_programs import as_pixels
from app.diffusion.models.loading import load_checkpoint
from capacity.model_names import MODEL_NAMES
from cluster import ROOT
from cluster.cli import run_command
from cluster.terminal import say
from demo.scenes import draw, sample_scene

PICTURES = 16

encode = nnx.jit(lambda vae, pixels: vae.encode(pixels)[0])
decode = nnx.jit(lambda vae, latents: as_pixels(vae.decode(latents)))


def psnr(pixels: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio of each picture, in dB."""
    error = np.square(pixels.astype(float) - reference).mean(axis=(1, 2, 3))
    return 10 * np.log10(255**2 / error)


def main() -> int:
    rng = np.random.default_rng(0)
    pictures = np.stack([draw(sample_scene(rng)) for _ in range(PICTURES)])
    vaes = [
        load_checkpoint(ROOT / MODEL_NAMES["demo"], dtype=dtype).networks["vae"]
        for dtype in (jnp.float32, jnp.bfloat16)
    ]
    latents = vaes[0].config.scaling_factor * encode(vaes[0], jnp.asarray(pictures / 127.5 - 1, jnp.float32))
    exact, rounded = (np.asarray(decode(vae, latents)) for vae in vaes)
    apart = psnr(rounded, exact)
    say(f"bfloat16 against float32: {apart.mean():.1f} dB, {apart.min():.1f} dB at least.")
    kept, lost = (psnr(decoded, pictures).mean() for decoded in (exact, rounded))
    say(f"Against the pictures: float32 {kept:.2f} dB, bfloat16 {lost:.2f} dB.")
    return 0


if __name__ == "__main__":
    run_command(main)
