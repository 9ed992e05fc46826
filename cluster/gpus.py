"""The NVIDIA GPUs of this machine, counted as Ray counts them."""

from app.ray_internals.core import NvidiaGPUAcceleratorManager


def visible_gpus() -> int:
    """How many GPUs the local cluster may give to replicas: those that CUDA_VISIBLE_DEVICES leaves visible."""
    count = NvidiaGPUAcceleratorManager.get_current_node_num_accelerators()
    visible = NvidiaGPUAcceleratorManager.get_current_process_visible_accelerator_ids()
    return count if visible is None else min(count, len(visible))
