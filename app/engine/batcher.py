"""Moves images through the device: from the queue into slots, through shared steps, and out to decoding.

All of it happens in the engine's thread. The order and the batch size are decided in app/engine/scheduler.py.
"""

import math
from collections.abc import Sequence

from app.engine.dispatcher import Dispatch, Dispatcher
from app.engine.failures import Failures, log_failure
from app.engine.intake import Intake
from app.engine.outputs import Outputs
from app.engine.prompt_cache import PromptCache
from app.engine.request import Image, Request, Status
from app.engine.scheduler import choose_batch, decode_due, steps_in_dispatch
from app.engine.size_queue import SizeQueue


class Batcher:
    def __init__(
        self, intake: Intake, dispatcher: Dispatcher, outputs: Outputs, failures: Failures, prompt_cache: PromptCache
    ):
        self.intake = intake
        self.queues = intake.queues
        self.changed = intake.changed
        self.dispatcher = dispatcher
        self.outputs = outputs
        self.failures = failures
        self.prompt_cache = prompt_cache

    def free_cancelled(self) -> None:
        """Takes requests whose futures have ended out of their slots and queues."""
        for queue in self.queues.values():
            if ended := [request for request in queue.requests if request.future.done()]:
                with self.changed:
                    for request in ended:
                        queue.remove(request)

    def release(self) -> None:
        """Takes requests that are to leave out of their slots and queues. Their images go to the host."""
        for queue in self.queues.values():
            for request in [request for request in queue.requests if request.leaving and request.between_steps]:
                images = request.images[:]
                try:
                    exported = {
                        image.number: self.dispatcher.export_slot(queue, image)
                        for image in images
                        if image.status is Status.RUNNING
                    }
                except Exception as error:
                    log_failure("An image could not be exported", error)
                    self._fail(request, error)
                    continue
                with self.changed:
                    request.move()
                    queue.remove(request)
                self.outputs.hand_over(request, images, exported)

    def admit(self, queue: SizeQueue) -> list[Image]:
        """Returns the images that share the next step. Those of them that wait go into free slots."""
        batch = choose_batch(queue, self.intake.expected_beside(queue))
        queue.batch_size, queue.expected_arrivals = batch.batch_size, batch.expected_arrivals
        queue.newcomer_joins = batch.newcomer_joins
        beginning = [image for image in batch.images if image.status is Status.WAITING and not image.moving]
        self._encode([image.request for image in beginning if image.request.encoded is None])
        self._encode_images(queue, [image.request for image in beginning if image.request.generation.edit])
        admitted = []
        for image in batch.images:
            if image in beginning and image.request.encoded is None:
                continue  # its prompt or its image could not be encoded, so the request has failed
            if image.status is Status.WAITING:
                with self.changed:
                    if image.request.status in (Status.FINISHED, Status.MOVED):
                        continue
                    image.request.begin(image, queue.free_slots.pop(), self.intake.clock())
                enter = self.dispatcher.import_slot if image.moving else self.dispatcher.insert
                enter(queue, image)
            admitted.append(image)
        return admitted

    def _encode(self, requests: Sequence[Request]) -> None:
        """Gives each request its encoded prompts. Only texts that are not in the cache are encoded."""
        requests = list(dict.fromkeys(requests))
        texts = [text for request in requests for text in request.texts]
        if missing := self.prompt_cache.missing(texts):
            try:
                self.prompt_cache.add(missing, self.dispatcher.encode(missing))
                self.failures.succeeded("encode")
            except Exception as error:
                log_failure(f"Encoding {len(missing)} prompts failed", error)
                for request in requests:
                    if not all(text in self.prompt_cache for text in request.texts):
                        self._fail(request, error)
                self.failures.failed("encode")
                requests = [request for request in requests if not request.future.done()]
                texts = [text for text in texts if text in self.prompt_cache]
        encoded = self.prompt_cache.use(texts)
        for request in requests:
            prompt, negative_prompt = request.texts
            request.encoded = (encoded[prompt], encoded[negative_prompt])
            request.truncated = (encoded[prompt].truncated, encoded[negative_prompt].truncated)

    def _encode_images(self, queue: SizeQueue, requests: Sequence[Request]) -> None:
        """Gives each request what its images begin from."""
        for request in dict.fromkeys(requests):
            if request.encoded is None or request.encoded_image is not None:
                continue
            try:
                self.dispatcher.encode_image(queue, request)
                self.failures.succeeded("encode")
            except Exception as error:
                log_failure("Encoding an image failed", error)
                request.encoded = None
                self._fail(request, error)
                self.failures.failed("encode")

    def advance(self, queue: SizeQueue, images: Sequence[Image]) -> None:
        """Dispatches steps for the images, and the previews that are due after them."""
        active = [image.active_slot for image in images]
        rows, cost = sum(slot.rows for slot in active), queue.cost_of(images)
        overhead = self.dispatcher.overhead(cost.launch_s(rows))
        count = steps_in_dispatch(images, cost.step_s(rows), overhead, queue.newcomer_joins)
        dispatch = self.dispatcher.step(queue, images, active, count)
        queue.virtual_time += dispatch.predicted_s / len(queue.images)
        queue.count_steps(count, rows, dispatch.bucket)
        with self.changed:
            for image in images:
                image.request.advance(image, count)
                if not image.steps_left:
                    image.last_dispatch = dispatch
                    dispatch.denoised.append(image)
        for image in images:
            if image.previews_due and image.previews_due[-1] == image.steps_left:
                self._preview(queue, image)

    def _preview(self, queue: SizeQueue, image: Image) -> None:
        number = image.request.next_preview(image)
        assert image.slot is not None
        try:
            pixels = self.dispatcher.preview(queue, image.slot)
        except Exception as error:
            log_failure("A preview failed", error)
            return
        self.outputs.show(image.request, number, pixels)

    def retire(self, queue: SizeQueue, running: Sequence[Image]) -> None:
        """Decodes denoised images in the cheapest buckets. They leave their slots at once."""
        images = queue.images
        denoised = [image for image in images if not image.steps_left]
        others = len(images) - len(denoised)
        step_s = queue.cost_of(running).step_s(sum(image.request.rows for image in running)) if running else 0.0
        next_s = min((image.steps_left * step_s for image in running), default=math.inf)
        if any(image.request.leaving for image in denoised):
            next_s = math.inf  # they leave as pixels, at once
        while denoised and decode_due(queue.decode_cost, len(denoised), next_s, others):
            bucket = queue.decode_cost.bucket(len(denoised))
            batch, denoised = denoised[:bucket], denoised[bucket:]
            try:
                decode = self.dispatcher.decode(queue, batch, queue.decode_cost.decode_s[bucket])
            except Exception as error:
                log_failure(f"A decode of {queue.name} failed", error)
                for image in batch:
                    self._fail(image.request, error)
                self.failures.failed("decode")
                denoised = [
                    image for image in denoised if image.status is Status.RUNNING
                ]  # the others have just failed
            else:
                self._leave_slots(queue, batch)
                self.outputs.fetch(batch, decode)

    def _leave_slots(self, queue: SizeQueue, batch: Sequence[Image]) -> None:
        with self.changed:
            for image in batch:
                queue.free_slots.append(image.request.leave_slot(image))
                if not image.request.images:
                    queue.requests.remove(image.request)

    def settle(self, ahead: int) -> bool:
        """Waits until at most `ahead` dispatches are in flight. Returns whether there were any."""
        in_flight = bool(self.dispatcher.in_flight)
        while len(self.dispatcher.in_flight) > ahead:
            dispatch = self.dispatcher.in_flight.popleft()
            try:
                self.dispatcher.wait(dispatch)
            except Exception as error:
                self._fail_dispatch(dispatch, error)
            else:
                self.failures.succeeded("step")
        return in_flight

    def _fail_dispatch(self, dispatch: Dispatch, error: Exception) -> None:
        """Also fails the images that it or a later dispatch denoised, as they may have left their slots already."""
        later = [other for other in self.dispatcher.in_flight if other.queue is dispatch.queue]
        for failed in (dispatch, *later):
            for image in failed.denoised:
                image.request.end(error)
        self.fail_queue(dispatch.queue, error, counts=not dispatch.suspect)

    def fail_queue(self, queue: SizeQueue, error: Exception, counts: bool = True) -> None:
        """Fails every request that has begun, as a failed step or insert has consumed the state."""
        log_failure(f"A step of {queue.name} failed", error)
        self.dispatcher.forget(queue)
        self.prompt_cache.clear()  # an encoding may have failed on the device
        for request in [request for other in self.queues.values() for request in other.requests]:
            if any(image.status is Status.WAITING for image in request.images):
                request.encoded = request.encoded_image = None
        for request in queue.requests[:]:
            if any(image.status is Status.RUNNING for image in request.images):
                self._fail(request, error)
        self.dispatcher.reset(queue)
        if counts:
            self.failures.failed("step")

    def _fail(self, request: Request, error: Exception) -> None:
        request.end(error)
        with self.changed:
            self.queues[request.size].remove(request)
