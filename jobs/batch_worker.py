"""One TPU host's part in batch generation: an engine, and the files of what it draws.

A row is finished when its record stands in `rows/`, which is written last, under a name that the row's key alone
decides, and by rename. So whatever is killed, and however often a row is given out, there is one record of it or none.
"""

import dataclasses
import json
import os
import socket
import time
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np

from app.api.messages import fact_text
from app.api.settings import Encoding
from app.diffusion.images import encode
from app.engine.engine import Engine
from app.engine.errors import EngineStopped
from app.engine.request import Generated
from app.serving.replica import facts_of
from app.types import Generation, InvalidField, PipelineSpec
from jobs.prompts import Row
from jobs.unfinished import write


class Painter:
    """What Ray Data calls with blocks of rows, several at a time, so that the engine never waits for the next."""

    def __init__(self, out: Path, drafts: Path, name: str, spec: PipelineSpec, gain: float) -> None:
        from app.diffusion.pipeline import Pipeline

        self.out, self.drafts, self.name = out, drafts, name
        pipeline = Pipeline.load(spec)
        pipeline.warmup()
        self.engine = Engine(pipeline, max_waiting=1_000_000, gain=gain)
        self.engine.start()
        self.host = f"{socket.gethostname()} {os.getpid()}"

    def __call__(self, block: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        rows = [row_of(text) for text in block["row"]]
        # Of a block that is given out again, because who drew it was killed, some may be finished.
        left = [row for row in rows if not all((self.out / name).exists() for name in row.made)]
        pending = [(row, self.submit(row.generation)) for row in left]
        outcomes = {row.key: ("", time.time()) for row in rows}
        for row, future in pending:
            outcomes[row.key] = self.finish(row, future), time.time()
        errors, ended = zip(*outcomes.values(), strict=True)
        return {"key": [*outcomes], "error": [*errors], "ended": [*ended], "host": [self.host] * len(outcomes)}

    def submit(self, generation: Generation) -> "Future[Generated] | str":
        try:
            return self.engine.submit(generation)
        except InvalidField as error:  # what only the checkpoint can refuse, such as a sampler that does not suit it
            return str(error)

    def finish(self, row: Row, future: "Future[Generated] | str") -> str:
        """Writes the row's pictures and its record; returns why not, if so."""
        if isinstance(future, str):
            return future
        try:
            generated = future.result()
            began = time.perf_counter()
            facts = facts_of(row.generation, generated)
            for name, pixels, seed in zip(row.files, generated.pixels, generated.seeds, strict=True):
                write(self.out / name, self.encoded(row, pixels, {**facts, "seed": seed}), self.drafts)
            record = {
                "key": row.key,
                "prompt": row.generation.prompt,
                "negative_prompt": row.generation.negative_prompt,
                **facts,
                "n": row.generation.n,
                "files": row.files,
                "queue_s": generated.queue_s,
                "denoise_s": generated.denoise_s,
                "decode_s": generated.decode_s,
                "encode_s": time.perf_counter() - began,
                "device_s": generated.device_s,
                "host": self.host,
                "ended": time.time(),
            }
            write(self.out / row.record, json.dumps(record).encode(), self.drafts)
        except (EngineStopped, OSError):  # a disk that is full, a mount that is gone: no row will fare better
            raise
        except Exception as error:  # of the device, for this row
            return f"{type(error).__name__}: {error}"
        return ""

    def encoded(self, row: Row, pixels: np.ndarray, facts: Mapping[str, Any]) -> bytes:
        encoding = row.encoding
        about = {
            "prompt": row.generation.prompt,
            "negative_prompt": row.generation.negative_prompt,
            "model": self.name,
            "Software": "imagine-tpu",
            **{name: fact_text(fact) for name, fact in facts.items()},
        }
        return encode(
            pixels, encoding.output_format, quality=encoding.quality, png_level=encoding.png_level, text=about
        )


def folders(out: Path) -> None:
    for name in ("images", "rows"):
        (out / name).mkdir(parents=True, exist_ok=True)


def text_of(row: Row) -> str:
    return json.dumps({**dataclasses.asdict(row), "encoding": row.encoding.model_dump()})


def row_of(text: str) -> Row:
    given = json.loads(text)
    generation, encoding = Generation(**given["generation"]), Encoding.model_validate(given["encoding"])
    return Row(given["number"], given["key"], generation, encoding)
