"""Trains a small flow-matching transformer of FLUX.2-klein's form on pictures that demo/scenes draws.

    python -m demo.train_flow --out outputs/demo-flow      # hours on two cores
    python -m demo.train_flow --architecture tiny ...      # learns next to nothing, to try out the whole path
    python -m demo.train_flow --export-only ...            # writes the folder from the last checkpoint

The pictures are those of the bundled model, through its VAE, which stays as it is. Transformer and text encoder are
trained together from nothing. It resumes from its last checkpoint in `--work`. The networks are the ones that are
served, and the result is a folder in diffusers layout.
"""

import shutil

from app.diffusion.models.chat_tokenizer import ChatTokenizer
from app.diffusion.models.loading import load_checkpoint
from app.diffusion.models.vae import VAE
from cluster.cli import Parser, UsageError
from demo.train import keep_compiled_programs
from demo.training.export import export_flow
from demo.training.flow import scaled_patches, train_flow
from demo.training.flow_networks import ARCHITECTURES, TEXT_LENGTH
from demo.training.flow_recipe import FlowRecipe
from demo.training.loop import claim_folder
from demo.training.options import add_options, recipe_of
from demo.training.pool import encoded_pool
from demo.training.tokenizer import write_chat_tokenizer
from jobs.entry import path, run

LATENTS = 16  # along each side of a picture, in patches of 2x2


def main() -> str:
    args = parser().parse_args()
    recipe = recipe_of(FlowRecipe, args)
    try:
        earlier = load_checkpoint(args.vae)
    except ValueError as error:
        raise UsageError(f"--vae: {error}") from None
    vae = earlier.networks["vae"]
    if type(vae) is not VAE:
        raise UsageError(f"--vae: must be a checkpoint with an AutoencoderKL, got {args.vae}.")
    args.work.mkdir(parents=True, exist_ok=True)
    claim_folder(args.work, recipe, args.vae)
    keep_compiled_programs(args.work)
    words = args.work / "tokenizer"
    if not words.exists():  # an existing one is kept, as its training breaks ties by chance
        words.mkdir()
        write_chat_tokenizer(words)
    tokenizer = ChatTokenizer(words, TEXT_LENGTH, thinking=False)
    pool = encoded_pool(recipe, args.work, vae, tokenizer, grid=LATENTS // 2)
    steps = 0 if args.export_only else recipe.steps
    transformer, text_encoder = train_flow(recipe, args.work, pool, tokenizer, steps)
    _, mean, deviation = scaled_patches(pool["latents"])
    shutil.copytree(words, args.out / "tokenizer", dirs_exist_ok=True)
    export_flow(args.out, ARCHITECTURES[recipe.architecture], transformer, text_encoder, earlier, mean, deviation)
    return f"The flow model stands in {args.out}, its checkpoints in {args.work}."


def parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--out", type=path, default="outputs/demo-flow", help="folder to write (%(default)s)")
    parser.add_argument("--work", type=path, default=".cache/train-flow", help="checkpoints (%(default)s)")
    parser.add_argument("--vae", type=path, default="assets/demo-model", help="folder whose VAE is kept (%(default)s)")
    parser.add_argument("--export-only", action="store_true", help="write the folder from the last checkpoint")
    add_options(parser, FlowRecipe, ARCHITECTURES)
    return parser


if __name__ == "__main__":
    run(main)
