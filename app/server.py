"""The replica: one checkpoint, one engine, and the way from a request to encoded pictures.

Imports nothing heavy, so that builders.py may import it: JAX arrives with the first replica. Knows nothing of HTTP, and
of Ray only the name of Serve's logger.
"""

import asyncio
import logging
import time
from collections.abc import Sequence

from app.engine import Engine, EngineStopped, Generated, QueueFull
from app.images import encode
from app.protocol import BODY_FIELDS, ApiError, Description, Encoding, Generation, Images, written

# Serve's handlers serve this tree only, and prefix each line with the request id that clients see as X-Request-ID.
logger = logging.getLogger(f"ray.serve.{__name__}")

STOPPED = ApiError(503, "The replica is stopping; try again.", None, "replica_lost", 1.0)


class StableDiffusion:
    """Ready when constructed: everything declared is loaded, compiled and has run once."""

    def __init__(
        self,
        model: str,
        *,
        name: str,
        revision: str | None,
        dtype: str,
        sizes: Sequence[tuple[int, int]],
        batch_buckets: Sequence[int],
        max_steps: int,
        max_waiting: int,
    ) -> None:
        from app.pipeline import Pipeline

        self.name = name
        started = time.perf_counter()
        self.pipeline = Pipeline.load(
            model, revision=revision, dtype=dtype, sizes=sizes, batch_buckets=batch_buckets, max_steps=max_steps
        )
        loaded = time.perf_counter()
        self.pipeline.warmup()
        logger.info("ready load_s=%.1f warmup_s=%.1f", loaded - started, time.perf_counter() - loaded)
        self.engine = Engine(self.pipeline, max_waiting=max_waiting)

    async def generate(self, generation: Generation, encoding: Encoding) -> Images | ApiError:
        """An expected refusal is returned: raised, Serve would log it with a traceback and count a failure."""
        try:
            future = self.engine.submit(generation)
        except QueueFull as full:
            return ApiError(503, "The queue is full; try again later.", None, "queue_full", full.retry_after_s)
        except ValueError as refusal:  # what only the checkpoint can refuse, such as a sampler that does not suit it
            named = str(refusal).partition(" ")[0]
            return ApiError(400, str(refusal), named if named in BODY_FIELDS else None, "invalid_value")
        except EngineStopped:
            return STOPPED
        try:
            generated = await asyncio.wrap_future(future)  # cancelled here, it is cancelled in the engine too
        except EngineStopped:
            return STOPPED
        started = time.perf_counter()
        facts = facts_of(generation, generated)
        encoded = await asyncio.to_thread(self.encode, generation, encoding, generated, facts)
        timings = {
            "queue_s": generated.queue_s,
            "denoise_s": generated.denoise_s,
            "decode_s": generated.decode_s,
            "encode_s": time.perf_counter() - started,
        }
        logger.info(
            "generated n=%d size=%s steps=%d sampler=%s %s",
            *(generation.n, facts["size"], generation.num_inference_steps, generated.sampler),
            " ".join(f"{name}={seconds:.3f}" for name, seconds in timings.items()),
        )
        return Images(encoded, generated.seeds, facts, timings)

    def encode(
        self, generation: Generation, encoding: Encoding, generated: Generated, facts: dict[str, str | int | float]
    ) -> tuple[bytes, ...]:
        """One file for each image; a PNG says what made it, with the seed that makes this very image alone."""
        text = {
            "prompt": generation.prompt,
            "negative_prompt": generation.negative_prompt,
            "model": self.name,
            "Software": "imagine-tpu",
            **{name: written(fact) for name, fact in facts.items()},
        }
        return tuple(
            encode(
                pixels,
                encoding.output_format,
                quality=encoding.quality,
                png_level=encoding.png_level,
                text={**text, "seed": written(seed)},
            )
            for pixels, seed in zip(generated.pixels, generated.seeds, strict=True)
        )

    async def describe(self) -> Description:
        return Description(tuple(self.pipeline.samplers), self.pipeline.default_sampler)

    async def check_health(self) -> None:
        """Three failures in a row make Serve replace this replica."""
        if not self.engine.healthy:
            raise RuntimeError("The engine has stopped.")

    def __del__(self) -> None:
        """Called by Serve once the replica has drained."""
        if hasattr(self, "engine"):  # not if the constructor failed
            self.engine.close()


def facts_of(generation: Generation, generated: Generated) -> dict[str, str | int | float]:
    """What a client needs in order to make the same picture again, and whether all of its prompt was read."""
    return {
        "seed": generation.seed,
        "sampler": generated.sampler,
        "num_inference_steps": generation.num_inference_steps,
        "guidance_scale": generation.guidance_scale,
        "size": f"{generation.width}x{generation.height}",
        "prompt_truncated": generated.prompt_truncated,
        "negative_prompt_truncated": generated.negative_prompt_truncated,
    }
