"""The model's replicas as the ingress uses them: each request waits for its place, and goes to the replica with it.

Knows nothing of HTTP, nor of how the place is chosen (app/api/routing/).
"""

from collections.abc import AsyncIterator, Generator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from ray.exceptions import RayActorError
from ray.serve.exceptions import DeploymentUnavailableError, ReplicaUnavailableError

from app.api.errors import ApiError, ReplicaGone
from app.api.journey import Unary
from app.api.messages import Description, ImageRequest, Images, Moved, Report
from app.api.parts import parts_of
from app.api.replica_calls import Item, Items, Pending, answer_of, broadcast
from app.api.replica_watch import ReplicaWatch
from app.api.routing.costs import Work
from app.api.routing.dispatch import Dispatch, Place
from app.api.stats import all_replica_ids
from app.ray_internals.routing import running_replicas

BROADCAST_TIMEOUT_S = 2.0  # for the answers of all replicas
LET_GO_S = 10.0
WAKE_S = 60.0  # how long a call waits for a first replica before the next takes its place


class Replicas:
    """`handle` is the DeploymentHandle of StableDiffusion."""

    def __init__(self, handle: Any, max_waiting: int) -> None:
        self.handle = handle
        self.watch = ReplicaWatch(self.poll)
        self.dispatch = Dispatch(max_waiting, self.refresh, self.wake, partial(all_replica_ids, handle), self.let_go)

    async def poll(self) -> list[Description]:
        """Asks all replicas for reports, and tells them of the queue."""
        state = self.dispatch.state()
        try:
            answers = await broadcast(self.handle, "report", BROADCAST_TIMEOUT_S, state)
        except DeploymentUnavailableError:  # no replica runs
            self.dispatch.reported([], running=())
            raise
        reports = [answer for answer in answers if isinstance(answer, Report)]
        self.dispatch.reported(reports, running_replicas(self.handle), polled=True)
        return [report.description for report in reports if report.description]

    async def refresh(self) -> None:
        await self.watch.refresh()

    async def wake(self) -> None:
        """Waits where Serve sees it until some replica answers. Raises ApiError if none will start."""
        response: Pending[Report] = self.handle.report.remote(self.dispatch.state())
        report = await answer_of(response, WAKE_S)
        self.dispatch.reported([report], new=True)

    async def let_go(self, replica: str, places: Sequence[str]) -> None:
        response: Pending[None] = self.handle.options(session_id=replica).let_go.remote(list(places))
        await answer_of(response, LET_GO_S)

    def parts(self, request: ImageRequest, key: str | None) -> list[ImageRequest]:
        """The request, or its images one by one where no replica could run all at once. Raises ApiError as it admits.

        Edits stay whole, as their images would go to several replicas; so does everything while two models run.
        """
        models = {description.model for description in self.watch.current}
        if request.generation.n == 1 or request.generation.edit or len(models) != 1:
            return [request]
        work, now = Work.of(request.generation), self.dispatch.clock()
        return parts_of(request, self.dispatch.router.images_together(work, now, request.timeout_s, key))

    async def send(self, request: ImageRequest, key: str | None = None) -> Unary:
        place = await self.place(request, key)
        handle = self.handle.options(session_id=place.replica)
        return PlacedAnswer(place, handle.generate.remote(placed(request, place)))

    async def send_stream(self, request: ImageRequest, key: str | None = None) -> Items:
        place = await self.place(request, key)
        handle = self.handle.options(session_id=place.replica, stream=True)
        return PlacedItems(place, handle.generate_stream.remote(placed(request, place)))

    async def place(self, request: ImageRequest, key: str | None) -> Place:
        """A request that another replica had, or was meant for, was admitted before."""
        again, resumed = request.moved or request.age_s > 0, request.resumed
        left = [image.steps_left for image in resumed.images] if resumed else None
        return await self.dispatch.enter(
            request.generation, request.timeout_s, key, again, request.age_s, left, request.siblings, request.counted
        )


def placed(request: ImageRequest, place: Place) -> ImageRequest:
    """The request as the replica gets it: what it has waited for its place counts there."""
    return replace(request, ahead_s=place.ahead_s, place=place.id)


class PlacedAnswer:
    """A replica's answer, until which the request has its place."""

    def __init__(self, place: Place, response: Unary) -> None:
        self.place, self.response = place, response

    def __await__(self) -> Generator[Any, None, Images | Moved | ApiError]:
        return self.answer().__await__()

    async def answer(self) -> Images | Moved | ApiError:
        with self.place:
            try:
                return seen(self.place, await self.response)
            except ReplicaGone:
                return not_taken(self.place)
            except (RayActorError, ReplicaUnavailableError):
                self.place.dispatch.gone(self.place.replica)
                raise

    def cancel(self) -> None:
        self.response.cancel()
        self.place.leave()


class PlacedItems:
    """A replica's stream, likewise."""

    def __init__(self, place: Place, items: Items) -> None:
        self.place, self.items = place, items

    def __aiter__(self) -> AsyncIterator[Item]:
        return self

    async def __anext__(self) -> Item:
        try:
            item = seen(self.place, await anext(self.items))
        except ReplicaGone:
            item = not_taken(self.place)
        except (RayActorError, ReplicaUnavailableError):
            self.place.dispatch.gone(self.place.replica)
            self.place.leave()
            raise
        except BaseException:
            self.place.leave()
            raise
        if isinstance(item, Images | Moved | ApiError):
            self.place.leave()
        return item

    def cancel(self) -> None:
        self.items.cancel()
        self.place.leave()


AnyItem = TypeVar("AnyItem", bound=Item)


def seen(place: Place, item: AnyItem) -> AnyItem:
    """Takes from an answer what concerns the book."""
    ends = isinstance(item, Moved) and (item.lost or not place.moving)
    if ends or (isinstance(item, ApiError) and item.code == "replica_lost"):
        place.dispatch.avoid(place.replica)
    if not isinstance(item, Images):
        return item
    place.leave()
    if item.report:
        place.dispatch.reported([item.report])
    timings = {"ingress_s": place.waited_s, **item.timings}
    return replace(item, timings=timings, report=None)


def not_taken(place: Place) -> Moved:
    """The replica stopped before the request reached it, so another one gets it."""
    place.dispatch.gone(place.replica)
    return Moved(accepted=False)
