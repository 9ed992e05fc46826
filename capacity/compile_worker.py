"""Compiles programs for capacity/compile_pool.py: a line of JSON for each request, and one for each answer.

It is a process of its own because libtpu ends the process on some errors.
"""

import json
import os
import queue
import sys
import threading
import traceback
from dataclasses import asdict
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from app.types import PipelineSpec
from capacity.chips import Host, host_of
from capacity.libtpu import compile_only

if TYPE_CHECKING:
    from app.diffusion.pipeline import Pipeline


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    compile_only()
    requests: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=listen, args=(requests,), daemon=True).start()
    while True:
        print(json.dumps(answer(json.loads(requests.get()))), file=answers, flush=True)


def listen(requests: "queue.SimpleQueue[str]") -> None:
    """Queues requests. Ends the process when the parent is gone, even in the middle of a compile of minutes."""
    for line in sys.stdin:
        requests.put(line)
    os._exit(0)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """{"cost": ...}, {"too_large": libtpu's sentence}, {"refused": the compiler's}, or {"failed": a traceback}."""
    from jax.errors import JaxRuntimeError

    from capacity.program_cost import OutOfMemory, cost_of
    from capacity.programs import shards_of

    try:
        spec = PipelineSpec(**{name: frozen(value) for name, value in request["spec"].items()})
        host = host_of(request["tpu"])
        program = next(program for program in pipeline(spec, host).programs if program.name == request["program"])
        cost = cost_of(program.trace(), host.chip, shards_of(program), program.compiler_options)
        return {"cost": asdict(cost)}
    except OutOfMemory as reason:
        return {"too_large": str(reason)}
    except (JaxRuntimeError, NotImplementedError) as error:
        return {"refused": str(error).strip().splitlines()[0]}
    except Exception:  # a bug of ours, not of the program
        return {"failed": traceback.format_exc()}


@lru_cache(1)
def pipeline(spec: PipelineSpec, host: Host) -> "Pipeline":
    from capacity.programs import pipeline_of

    return pipeline_of(spec, host)


def frozen(value: Any) -> Any:
    """Turns the lists of JSON back into tuples."""
    return tuple(frozen(item) for item in value) if isinstance(value, list) else value


if __name__ == "__main__":
    main()
