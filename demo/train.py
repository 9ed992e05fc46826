"""Trains the bundled demo model (assets/demo-model) from nothing, on pictures that demo/scenes draws.

    python -m demo.train                       # about 2.5 hours on two cores
    python -m demo.train --architecture tiny   # a network that learns next to nothing, to try out the whole path
    python -m demo.train --export-only         # writes the folder from the last checkpoint

There are five stages. The VAE learns to reproduce pictures. A pool of scenes is drawn and encoded once. The text
encoder learns what captions mean. The UNet learns to denoise the pool's latents, and the text encoder with it. The
decoder is trained further for sharper pictures. Each stage resumes from its last checkpoint in `--work`. The networks
are the ones that are served, and the result is a folder in diffusers layout.
"""

import shutil
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from app.aot.cache_key import digest, host
from app.diffusion.models.loading import load_checkpoint
from app.diffusion.models.tokenizer import Tokenizer
from app.diffusion.models.unet import UNet
from cluster.cli import Parser, UsageError
from demo.training.export import export
from demo.training.loop import claim_folder
from demo.training.model_card import write_card
from demo.training.networks import ARCHITECTURES, TEXT_JSON
from demo.training.options import add_options, recipe_of
from demo.training.pool import encoded_pool
from demo.training.recipe import STAGES, Recipe
from demo.training.text_encoder import train_text_encoder
from demo.training.tokenizer import write_tokenizer
from demo.training.unet import mean_of, train_unet
from demo.training.vae import sharpen_decoder, train_vae
from jobs.entry import path, run


def main() -> str:
    arguments = parser()
    args = arguments.parse_args()
    if args.average and not args.start_from:
        arguments.error("--average needs --start-from: the weights to average with.")
    recipe = recipe_of(Recipe, args)
    architecture = ARCHITECTURES[recipe.architecture]
    try:
        earlier = load_checkpoint(args.start_from) if args.start_from else None
    except ValueError as error:
        raise UsageError(f"--start-from: {error}") from None
    args.work.mkdir(parents=True, exist_ok=True)
    claim_folder(args.work, recipe, args.start_from)
    keep_compiled_programs(args.work)
    words = (earlier.path if earlier else args.work) / "tokenizer"
    if not words.exists():  # an existing one is kept, as its training breaks ties by chance
        words.mkdir(parents=True)
        write_tokenizer(words)
    tokenizer = Tokenizer(words, TEXT_JSON["max_position_embeddings"])

    steps = dict.fromkeys(STAGES, 0) if args.export_only else {s: getattr(recipe, f"{s}_steps") for s in STAGES}
    vae = earlier.networks["vae"] if earlier else train_vae(recipe, args.work, steps["vae"])
    earlier_factor = vae.config.scaling_factor  # the earlier UNet was trained with it
    vae.config = architecture.vae  # the pool's factor scales latents; this one only counts in what is written
    pool = encoded_pool(recipe, args.work, vae, tokenizer)
    if earlier:
        pool["scaling_factor"] = np.array(earlier_factor, np.float32)
    if earlier and earlier.networks["text_encoder"].config == architecture.text_encoder(tokenizer):
        text_encoder = earlier.networks["text_encoder"]
    else:
        text_encoder = train_text_encoder(recipe, args.work, tokenizer, steps["text"])
    unet = earlier.networks["unet"] if earlier else UNet(architecture.unet, rngs=nnx.Rngs(recipe.seed + 1))
    unet, text_encoder = train_unet(recipe, args.work, pool, tokenizer, unet, text_encoder, steps["unet"])
    if args.average:
        start = load_checkpoint(args.start_from)  # loaded again, as training has used up the arrays of `earlier`
        unet = mean_of(start.networks["unet"], unet)
        text_encoder = mean_of(start.networks["text_encoder"], text_encoder)
    vae = sharpen_decoder(recipe, args.work, vae, steps["decoder"])
    shutil.copytree(words, args.out / "tokenizer", dirs_exist_ok=True)
    export(args.out, architecture, vae, unet, text_encoder, scaling_factor=float(pool["scaling_factor"]))
    networks = {"VAE": vae, "UNet": unet, "text encoder": text_encoder}
    write_card(args.out, args.work, recipe, networks, earlier.path if earlier else None, args.average)
    return f"The demo model stands in {args.out}, its checkpoints in {args.work}."


def parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--out", type=path, default="assets/demo-model", help="folder to write (%(default)s)")
    parser.add_argument("--work", type=path, default=".cache/train-demo", help="checkpoints (%(default)s)")
    parser.add_argument("--export-only", action="store_true", help="write the folder from the last checkpoint")
    parser.add_argument("--start-from", type=path, help="folder whose networks to train further (none: from nothing)")
    parser.add_argument(
        "--average",
        action="store_true",
        help="write the mean of the networks of --start-from and of the trained ones (UNet, text encoder)",
    )
    add_options(parser, Recipe, ARCHITECTURES)
    return parser


def keep_compiled_programs(work: Path) -> None:
    """Keeps compiled programs in `work`, so that a resumed training does not compile again what it compiled before.

    JAX does not check for which CPU a program was compiled, so each kind of machine has its own folder.
    """
    jax.config.update("jax_compilation_cache_dir", str(work / "compiled" / digest(host().encode())))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


if __name__ == "__main__":
    run(main)
