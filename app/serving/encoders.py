"""Encodes images and previews to files on threads, so that the replica's event loop stays free."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from app.api.settings import Encoding
from app.engine.request import Generated
from app.serving.image_metadata import encode_image, encode_preview
from app.types import Generation


class Encoders:
    """The threads of one replica. `model` is the name that its PNGs carry."""

    def __init__(self, threads: int, model: str) -> None:
        self.threads = ThreadPoolExecutor(threads, thread_name_prefix="encode")
        self.model = model

    async def images(self, generation: Generation, generated: Generated, encoding: Encoding) -> tuple[bytes, ...]:
        """The files of a request's images, encoded side by side."""
        files = [
            self.encode(encode_image, generation, generated, index, encoding, self.model)
            for index in range(generation.n)
        ]
        return tuple(await asyncio.gather(*files))

    async def preview(self, pixels: np.ndarray, encoding: Encoding) -> bytes:
        return await self.encode(encode_preview, pixels, encoding)

    async def encode(self, function: Callable[..., bytes], *arguments: Any) -> bytes:
        return await asyncio.get_running_loop().run_in_executor(self.threads, function, *arguments)

    def shutdown(self) -> None:
        """Waits for the files that are being encoded."""
        self.threads.shutdown()
