"""Prices programs that it is asked for, a line of JSON each way: a process of its own, as libtpu ends the process when
it meets something that it did not expect.
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
    os.dup2(2, 1)  # libraries may print what they like
    compile_only()
    asked: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=listen, args=(asked,), daemon=True).start()
    while True:
        print(json.dumps(answer(json.loads(asked.get()))), file=answers, flush=True)


def listen(asked: "queue.SimpleQueue[str]") -> None:
    """Ends the process when whoever asks is gone, in the middle of a compile too: that can take minutes."""
    for line in sys.stdin:
        asked.put(line)
    os._exit(0)


def answer(asked: dict[str, Any]) -> dict[str, Any]:
    """{"price": ...}, {"too_large": libtpu's words}, {"refused": the compiler's} or {"failed": a traceback}."""
    from jax.errors import JaxRuntimeError

    from capacity.price import TooLarge, price
    from capacity.programs import shards_of

    try:
        served = PipelineSpec(**{name: frozen(value) for name, value in asked["served"].items()})
        host = host_of(asked["tpu"])
        program = next(one for one in pipeline(served, host).programs if one.name == asked["program"])
        return {"price": asdict(price(program.trace(), host.chip, shards_of(program)))}
    except TooLarge as reason:
        return {"too_large": str(reason)}
    except (JaxRuntimeError, NotImplementedError) as error:
        return {"refused": str(error).strip().splitlines()[0]}
    except Exception:  # ours, not the program's
        return {"failed": traceback.format_exc()}


@lru_cache(1)
def pipeline(served: PipelineSpec, host: Host) -> "Pipeline":
    from capacity.programs import pipeline_of

    return pipeline_of(served, host)


def frozen(value: Any) -> Any:
    """A list of JSON's, as the tuple that it was."""
    return tuple(frozen(one) for one in value) if isinstance(value, list) else value


if __name__ == "__main__":
    main()
