"""Flags of libtpu, the compiler for TPUs, that suit the networks here. Imports neither them nor JAX.

libtpu reads LIBTPU_INIT_ARGS once, when JAX first asks for devices. On other platforms nothing reads it.
"""

import os
from collections.abc import MutableMapping

VARIABLE = "LIBTPU_INIT_ARGS"
FLAGS = {
    # Attention is one operation at any size. By default libtpu does so only where the attention weights take gigabytes,
    # so that eight rows of 512x512 cost more than sixteen.
    "xla_tpu_rwb_max_attention_hbm_footprint": "0",
    # The matrix products of a feed-forward are nested, so that intermediate arrays stay on the chip.
    "xla_tpu_enable_multi_level_output_dot_dot_fusion": "true",
    # Where feature maps change their layout, a fused copy takes longer than one alone.
    "xla_tpu_enable_copy_fusion": "false",
    # The default stack of libtpu 0.0.42.1, 64 KiB, overflows when it prices attention in one operation, which ends the
    # process.
    "fibers_default_thread_stack_size": "1048576",
}

# Chips with 128 MiB of VMEM, by JAX's name of their kind.
LARGE_VMEM = {"TPU v5 lite", "TPU v6 lite"}


def transformer_options(device_kind: str) -> dict[str, str]:
    """Compiler options for the step of a transformer: an operation may use 64 MiB of VMEM, so that wide products have
    larger tiles. UNets lose by it."""
    return {"xla_tpu_scoped_vmem_limit_kib": "65536"} if device_kind in LARGE_VMEM else {}


def set_flags(environment: MutableMapping[str, str] = os.environ) -> None:
    """Adds the flags, except those that the user has set."""
    present = environment.get(VARIABLE, "").split()
    names = {flag.lstrip("-").partition("=")[0] for flag in present}
    missing = [f"--{name}={value}" for name, value in FLAGS.items() if name not in names]
    if missing:
        environment[VARIABLE] = " ".join([*present, *missing])
