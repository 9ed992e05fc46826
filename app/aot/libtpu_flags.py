"""What libtpu, the compiler for TPUs, has to be told for the networks here. Knows nothing of them, nor of JAX.

libtpu reads LIBTPU_INIT_ARGS once, when JAX asks for devices for the first time. Elsewhere nothing reads it.
"""

import os
from collections.abc import MutableMapping

VARIABLE = "LIBTPU_INIT_ARGS"
FLAGS = {
    # Attention in one operation, whatever its size. Left to itself libtpu does so only where the weights would take
    # gigabytes, so that eight rows of 512x512 are dearer than sixteen.
    "xla_tpu_rwb_max_attention_hbm_footprint": "0",
    # A feed-forward's products one inside another, so that what stands between them stays on the chip.
    "xla_tpu_enable_multi_level_output_dot_dot_fusion": "true",
    # Copies that are fused take longer than they do alone, where feature maps change their layout.
    "xla_tpu_enable_copy_fusion": "false",
    # Pricing attention in one operation overflows the stack of libtpu 0.0.42.1, and that ends the process (64 KiB are
    # too few).
    "fibers_default_thread_stack_size": "1048576",
}


def set_flags(environment: MutableMapping[str, str] = os.environ) -> None:
    """Adds the flags. What the user has set stays as it is."""
    given = environment.get(VARIABLE, "").split()
    names = {flag.lstrip("-").partition("=")[0] for flag in given}
    missing = [f"--{name}={value}" for name, value in FLAGS.items() if name not in names]
    if missing:
        environment[VARIABLE] = " ".join([*given, *missing])
