"""What a client is told when the engine refuses a request, and the outcome that metrics count."""

from app.api.errors import ApiError, deadline_unmeetable, queue_full
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
            return queue_full(error.retry_after_s)
        case DeadlineUnmeetable():
            return deadline_unmeetable(error.estimate_s, request.timeout_s, error.retry_after_s)
