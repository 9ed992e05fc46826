"""Brings pixels to the host and completes requests, in a thread of its own. Knows nothing of slots and schedules."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from typing import Any

import numpy as np

from app.engine.device_time import Work
from app.engine.dispatcher import Dispatcher
from app.engine.errors import HandedOver
from app.engine.failures import Failures, log_failure
from app.engine.moving import resumed_of
from app.engine.request import Image, Request, Status


class Outputs:
    """The executor has one thread, so previews and images arrive in the order in which the device makes them."""

    def __init__(
        self,
        executor: Executor,
        dispatcher: Dispatcher,
        failures: Failures,
        default_sampler: str,
        clock: Callable[[], float],
    ):
        self.executor = executor
        self.dispatcher = dispatcher
        self.failures = failures
        self.default_sampler = default_sampler
        self.clock = clock

    def fetch(self, batch: Sequence[Image], decode: Work) -> None:
        self.executor.submit(self._fetch, batch, decode, decode.done)

    def show(self, request: Request, number: int, pixels: Any) -> None:
        self.executor.submit(self._show, request, number, pixels)

    def hand_over(self, request: Request, images: Sequence[Image], exported: Mapping[int, Any]) -> None:
        self.executor.submit(self._hand_over, request, images, exported)

    def _hand_over(self, request: Request, images: Sequence[Image], exported: Mapping[int, Any]) -> None:
        """Brings the images that have begun to the host, and ends the request in this engine."""
        try:
            with self.dispatcher.call("read"):
                packed = {
                    image.number: self.dispatcher.packed(image, exported[image.number])
                    for image in images
                    if image.number in exported
                }
            request.end(HandedOver(resumed_of(request, images, packed)))
        except BaseException as error:
            request.end(error)
            log_failure("An image that moves could not be fetched", error)

    def _fetch(self, batch: Sequence[Image], decode: Work, pixels: Any) -> None:
        """Ends the requests of these images if anything fails. Their other images leave at the engine's next tick."""
        try:
            denoised, images = self._read(batch, decode, pixels)
        except BaseException as error:
            self.failures.read_failed()
            for image in batch:
                image.request.end(error)
            log_failure("Decoded pixels could not be fetched", error)
            return
        finally:
            self.dispatcher.drop(decode)
        self.failures.read()
        for image, at, decoded in zip(batch, denoised, images, strict=True):
            request = image.request
            try:
                if request.receive(image, decoded, at):
                    request.end(request.generated(self.default_sampler, self.clock()))
            except BaseException as error:
                request.end(error)
                log_failure("A request could not be completed", error)

    def _read(self, batch: Sequence[Image], decode: Work, pixels: Any) -> tuple[list[float], np.ndarray]:
        """Waits for the device. Returns when each image's denoising ended, and the decoded images."""
        with self.dispatcher.call("read"):
            denoised = [self.dispatcher.denoised_at(image) for image in batch]
            self.failures.stepped()
            self.dispatcher.wait_for_decode(decode)
            images = np.asarray(pixels)
        if images.ndim != 4 or len(images) < len(batch):
            raise ValueError(f"decode must return {len(batch)} or more images, got an array of shape {images.shape}.")
        return denoised, images[: len(batch)]

    def _show(self, request: Request, number: int, pixels: Any) -> None:
        """Gives a preview to the client. If that fails, the image is still made."""
        try:
            if request.status is not Status.FINISHED and request.on_preview is not None:
                with self.dispatcher.call("read"):
                    image = np.asarray(pixels)[0]
                request.on_preview(number, request.shown(image))
        except Exception as error:
            log_failure("A preview failed", error)
