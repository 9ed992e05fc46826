"""What a client is told when the engine refuses a request, and the outcome that metrics count."""

import math

from app.api.errors import ApiError
from app.api.messages import ImageRequest
from app.engine.errors import DeadlineUnmeetable, EngineStopped, HandedOver, NotResumable, QueueFull

Refused = QueueFull | DeadlineUnmeetable


def outcome_of(error: BaseException | None) -> str:
    match error:
        case None:
            return "completed"
        case QueueFull():
            return "queue_full"
        case DeadlineUnmeetable():
            return "deadline"
        case HandedOver():
            return "moved"
        case EngineStopped():
            return "stopped"
        case NotResumable():
            return "not_resumable"
    return "failed"


def refusal(error: Refused, request: ImageRequest) -> ApiError:
    match error:
        case QueueFull():
            return ApiError(503, "The queue is full; try again later.", None, "queue_full", error.retry_after_s)
        case DeadlineUnmeetable():
            message = (
                f"This would be ready in {rounded_up(error.estimate_s)} s, and timeout is {request.timeout_s:g} s; "
                "try again later or with a longer timeout."
            )
            return ApiError(503, message, "timeout", "deadline_unmeetable", error.retry_after_s)


def rounded_up(seconds: float) -> str:
    """Rounded up to a tenth, so that a deadline that is missed narrowly does not read as if it were met."""
    return f"{math.ceil(10 * seconds) / 10:g}"
