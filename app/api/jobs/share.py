"""Jobs wait behind people: while somebody waits for an answer, jobs get a declared share of the devices' time.

Counts whole device-seconds when they are spent. Knows nothing of the line that requests themselves wait in.
"""

from collections import deque

from starlette.types import ASGIApp, Receive, Scope, Send

REMEMBERED = 64  # finished requests, which give the speed of a device


class Share:
    def __init__(self, share: float) -> None:
        self.share = share
        self.finished: deque[tuple[float, float]] = deque(maxlen=REMEMBERED)  # work and device-seconds
        self.connected = 0  # requests for images whose clients wait
        self.connected_s = self.jobs_s = 0.0  # device-seconds since the first of them came

    def allows(self, running: int) -> bool:
        """Whether another job may begin beside `running` ones; while people wait, none does beside another."""
        if not self.connected:
            return True
        return not running and self.jobs_s < self.share * (self.jobs_s + self.connected_s)

    def came(self) -> None:
        if not self.connected:
            self.connected_s = self.jobs_s = 0.0
        self.connected += 1

    def went(self) -> None:
        self.connected -= 1

    def spent(self, work: float, device_s: float, *, job: bool) -> None:
        self.finished.append((work, device_s))
        if job:
            self.jobs_s += device_s
        else:
            self.connected_s += device_s

    def seconds(self, work: float, replicas: int) -> float | None:
        """Until jobs of so much work have ended, if everything stays as it is; None if nobody can tell."""
        known, device_s = map(sum, zip(*self.finished, strict=True)) if self.finished else (0.0, 0.0)
        part = self.share if self.connected else 1.0
        return work * device_s / known / (part * max(1, replicas)) if known and part else None


class ConnectedMiddleware:
    """Counts the requests for images until their answers have ended."""

    def __init__(self, app: ASGIApp, share: Share) -> None:
        self.app = app
        self.share = share

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        if path != "/imagine" and not path.startswith("/v1/images/"):
            await self.app(scope, receive, send)
            return
        self.share.came()
        try:
            await self.app(scope, receive, send)
        finally:
            self.share.went()
