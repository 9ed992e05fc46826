"""One TPU host's part in batch generation: an engine, and the files of its images.

A row is finished when its record is in `rows/`. The record is written last, by rename, under a name that follows from
the row's key alone. So a row has one record or none, whatever is killed and however often the row is handed out.
"""

import dataclasses
import json
import os
import socket
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np

from app.api.settings import Encoding
from app.engine.engine import Engine
from app.engine.errors import EngineStopped
from app.engine.request import Generated
from app.serving.image_metadata import encode_image, facts_of, timings_of
from app.types import Generation, InvalidField, PipelineSpec
from jobs.prompts import Row
from jobs.row_images import RowImages
from jobs.unfinished import write


class BatchWorker:
    """Ray Data calls it with several blocks of rows at a time, so that the engine never waits for the next block."""

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
        # A block is handed out again when its worker was killed, and some of its rows may be finished.
        unfinished = [row for row in rows if not all((self.out / name).exists() for name in row.made)]
        pending = [(row, self.submit(row)) for row in unfinished]
        outcomes = {row.key: ("", time.time()) for row in rows}
        for row, future in pending:
            outcomes[row.key] = self.finish(row, future), time.time()
        errors, ended = zip(*outcomes.values(), strict=True)
        return {"key": [*outcomes], "error": [*errors], "ended": [*ended], "host": [self.host] * len(outcomes)}

    def submit(self, row: Row) -> "Future[Generated] | str":
        generation = row.generation
        try:
            if row.images:
                edit = row.images.edit((generation.width, generation.height))
                generation = dataclasses.replace(generation, edit=edit)
            return self.engine.submit(generation)
        except InvalidField as error:  # only the checkpoint can refuse it, such as a sampler that does not suit it
            return str(error)

    def finish(self, row: Row, future: "Future[Generated] | str") -> str:
        """Writes the row's images and its record. Returns an error message, or an empty string."""
        if isinstance(future, str):
            return future
        try:
            generated = future.result()
            began = time.perf_counter()
            for index, name in enumerate(row.files):
                image = encode_image(row.generation, generated, index, row.encoding, self.name)
                write(self.out / name, image, self.drafts)
            record = {
                "key": row.key,
                "prompt": row.generation.prompt,
                "negative_prompt": row.generation.negative_prompt,
                **facts_of(row.generation, generated),
                "n": row.generation.n,
                "strength": row.images and row.images.strength,
                "files": row.files,
                **timings_of(generated, encode_s=time.perf_counter() - began),
                "host": self.host,
                "ended": time.time(),
            }
            write(self.out / row.record, json.dumps(record).encode(), self.drafts)
        except (EngineStopped, OSError):  # a full disk or a lost mount fails every other row too
            raise
        except Exception as error:  # of the device, with this row
            return f"{type(error).__name__}: {error}"
        return ""


def folders(out: Path) -> None:
    for name in ("images", "rows"):
        (out / name).mkdir(parents=True, exist_ok=True)


def text_of(row: Row) -> str:
    images = row.images and row.images.plain()
    fields = dataclasses.asdict(dataclasses.replace(row, images=None))
    return json.dumps({**fields, "encoding": row.encoding.model_dump(), "images": images})


def row_of(text: str) -> Row:
    fields = json.loads(text)
    pairs = tuple((name, (first, second)) for name, (first, second) in fields["generation"].pop("fields"))
    generation, encoding = Generation(**fields["generation"], fields=pairs), Encoding.model_validate(fields["encoding"])
    images = fields["images"] and RowImages.of_plain(fields["images"])
    return Row(fields["number"], fields["key"], generation, encoding, images)
