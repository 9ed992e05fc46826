"""A job as GET /v1/jobs/{id} answers it: the states and names of OpenAI's own asynchronous objects."""

import json
from collections.abc import Callable

from app.api.jobs.table import Job, Line


def job_object(job: Job, url: Callable[[str], str], line: Line | None, remaining_s: float | None) -> dict[str, object]:
    """`url` makes the address of a file of its name. `line` is that of a queued job."""
    result = None
    if job.result is not None:
        content = json.loads(job.result)
        data = [{"url": url(picture["file"]), "seed": picture["seed"]} for picture in content.pop("data")]
        result = {"created": whole(job.ended), "data": data, **content}
    return {
        "id": job.id,
        "object": "job",
        "status": job.status,
        "model": job.model,
        "created_at": whole(job.created),
        "started_at": whole(job.started),
        "completed_at": whole(job.ended),
        "expires_at": whole(job.expires),
        "position": None if line is None else line.position,
        "estimated_s": None if remaining_s is None else round(remaining_s, 1),
        "progress": 100 if job.status == "completed" else job.progress,
        "attempts": job.attempts,
        "result": result,
        "error": None if job.error is None else json.loads(job.error),
    }


def whole(seconds: float | None) -> int | None:
    return None if seconds is None else int(seconds)
