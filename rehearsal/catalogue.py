"""What Google offers where, as far as this project's cluster files name it. The discovery documents do not say.

From Google's pages, read in 2026: cloud.google.com/tpu/docs/regions-zones, .../tpu/docs/runtimes,
cloud.google.com/compute/docs/general-purpose-machines, .../compute/docs/images/os-details. Google may have changed it.
"""

# Zone -> TPU generation -> numbers after the hyphen of an accelerator type.
V5E = (1, 4, 8, 16, 32, 64, 128, 256)
ACCELERATORS: dict[str, dict[str, tuple[int, ...]]] = {
    "us-central1-a": {"v5litepod": V5E},
    "us-south1-a": {"v5litepod": V5E},
    "us-west1-c": {"v5litepod": V5E},
    "us-west4-a": {"v5litepod": V5E},
    "us-central2-b": {"v4": (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)},
    "us-central1-b": {"v6e": V5E},
    "us-east1-d": {"v6e": V5E},
    "us-east5-a": {"v6e": V5E},
    "us-east5-b": {"v6e": V5E},
}
RUNTIMES = ("tpu-ubuntu2204-base", "v2-alpha-tpuv5-lite", "v2-alpha-tpuv5", "v2-alpha-tpuv6e")
CORES_PER_CHIP = {"v4": 2}  # of generations whose accelerator types count cores
CHIPS_PER_HOST = 4  # of a slice of several hosts
ONE_HOST_CHIPS = 8  # of a v5e or v6e slice on one host

MACHINES = {f"{family}-standard-{cpus}": cpus for family in ("n2", "e2") for cpus in (2, 4, 8, 16)}
IMAGES = {f"ubuntu-os-cloud/{name}" for name in ("ubuntu-2204-lts", "ubuntu-2404-lts-amd64")}

# A new project's limits: of a region for machines, of a zone for chips.
QUOTAS = {"N2_CPUS": 24, "E2_CPUS": 24, "IN_USE_ADDRESSES": 8, "v5litepod": 16, "v4": 16, "v6e": 16}


def chips(accelerator: str) -> int:
    generation, _, size = accelerator.partition("-")
    return int(size) // CORES_PER_CHIP.get(generation, 1)


def hosts(accelerator: str) -> int:
    one_host = CHIPS_PER_HOST if accelerator.startswith("v4") else ONE_HOST_CHIPS
    count = chips(accelerator)
    return 1 if count <= one_host else count // CHIPS_PER_HOST


def offered(zone: str, accelerator: str) -> bool:
    generation, _, size = accelerator.partition("-")
    return size in map(str, ACCELERATORS.get(zone, {}).get(generation, ()))
