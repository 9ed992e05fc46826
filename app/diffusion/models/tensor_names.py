"""How a checkpoint's tensors are named and shaped where files of different age differ. Imports nothing."""

import re

# VAEs saved before diffusers 0.17 name their attention's layers so.
OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
# A constant that transformers used to save with the text encoder, and how many batches a norm's statistics are of.
NOT_WEIGHTS = {"embeddings.position_ids", "bn.num_batches_tracked"}


def current_name(key: str) -> str:
    """Real aliases: transformers' prefixes and the VAE attention's former names."""
    key = key.removeprefix("text_model.").removeprefix("model.")
    if match := re.fullmatch(r"((?:en|de)coder\.mid_block\.attentions\.0\.)(\w+)(\.\w+)", key):
        return match[1] + OLD_VAE_ATTENTION.get(match[2], match[2]) + match[3]
    return key


def squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A 1x1 convolution is a linear layer: SD 1.x saves some layers as the one, SD 2.x as the other."""
    return shape[:2] if len(shape) == 4 and shape[2:] == (1, 1) else shape
