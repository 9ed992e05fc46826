"""Trains a small flow-matching transformer of FLUX.2-klein's form on pictures that demo/scenes draws.

    python -m demo.train_flow --out outputs/demo-flow      # hours on two cores
    python -m demo.train_flow --architecture tiny ...      # learns next to nothing, to try out the whole path
    python -m demo.train_flow --export-only ...            # writes the folder from the last checkpoint

The pictures are those of the bundled model, through its VAE, which stays as it is. Transformer and text encoder are
trained together, from nothing or from an earlier training's folder. It resumes from its last checkpoint in `--work`.
The networks are the ones that are served, and the result is a folder in diffusers layout.
"""

import shutil

import numpy as np

from app.diffusion.models.chat_tokenizer import ChatTokenizer
from app.diffusion.models.flux2_vae import Flux2VAE
from app.diffusion.models.loading import load_checkpoint
from app.diffusion.models.vae import VAE
from cluster.cli import Parser, UsageError
from demo.train import keep_compiled_programs
from demo.training.export import export_flow
from demo.training.flow import new_networks, statistics_of, train_flow
from demo.training.flow_networks import ARCHITECTURES, TEXT_LENGTH
from demo.training.flow_recipe import FlowRecipe
from demo.training.loop import claim_folder
from demo.training.model_card import write_flow_card
from demo.training.options import add_options, recipe_of
from demo.training.pool import encoded_pool
from demo.training.tokenizer import write_chat_tokenizer
from jobs.entry import path, run

LATENTS = 16  # along each side of a picture, in patches of 2x2


def main() -> str:
    args = parser().parse_args()
    recipe = recipe_of(FlowRecipe, args)
    architecture = ARCHITECTURES[recipe.architecture]
    option, folder = ("--start-from", args.start_from) if args.start_from else ("--vae", args.vae)
    try:
        earlier = load_checkpoint(folder)
    except ValueError as error:
        raise UsageError(f"{option}: {error}") from None
    vae = earlier.networks["vae"]
    if type(vae) is not (Flux2VAE if args.start_from else VAE):
        kind = "a folder that this command wrote" if args.start_from else "a checkpoint with an AutoencoderKL"
        raise UsageError(f"{option}: must be {kind}, got {folder}.")
    if args.start_from and earlier.networks["transformer"].config != architecture.transformer:
        raise UsageError(f"--start-from: {folder} has another --architecture than {recipe.architecture}.")
    args.work.mkdir(parents=True, exist_ok=True)
    claim_folder(args.work, recipe, folder)
    keep_compiled_programs(args.work)
    words = (folder if args.start_from else args.work) / "tokenizer"
    if not words.exists():  # an existing one is kept, as its training breaks ties by chance
        words.mkdir()
        write_chat_tokenizer(words)
    tokenizer = ChatTokenizer(words, TEXT_LENGTH, thinking=False)
    pool = encoded_pool(recipe, args.work, vae, tokenizer, grid=LATENTS // 2)
    if isinstance(vae, Flux2VAE):
        networks = earlier.networks["transformer"], earlier.networks["text_encoder"]
        mean, deviation = (np.asarray(array) for array in vae.statistics())
    else:
        networks = new_networks(architecture, len(tokenizer.tokenizer), recipe.seed)
        mean, deviation = statistics_of(pool["latents"])
    steps = 0 if args.export_only else recipe.steps
    transformer, text_encoder = train_flow(recipe, args.work, pool, mean, deviation, tokenizer, *networks, steps)
    shutil.copytree(words, args.out / "tokenizer", dirs_exist_ok=True)
    export_flow(args.out, architecture, transformer, text_encoder, earlier, mean, deviation)
    trained = {"transformer": transformer, "text encoder": text_encoder, "VAE": vae}
    write_flow_card(args.out, args.work, recipe, trained, args.start_from)
    return f"The flow model stands in {args.out}, its checkpoints in {args.work}."


def parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--out", type=path, default="outputs/demo-flow", help="folder to write (%(default)s)")
    parser.add_argument("--work", type=path, default=".cache/train-flow", help="checkpoints (%(default)s)")
    parser.add_argument("--vae", type=path, default="assets/demo-model", help="folder whose VAE is kept (%(default)s)")
    parser.add_argument("--export-only", action="store_true", help="write the folder from the last checkpoint")
    parser.add_argument("--start-from", type=path, help="folder of this command to train further (none: from nothing)")
    add_options(parser, FlowRecipe, ARCHITECTURES)
    return parser


if __name__ == "__main__":
    run(main)
