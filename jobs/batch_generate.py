"""Draws a file of prompts at full throughput, with Ray Data, on as many TPU hosts as the cluster provides.

    python -m jobs.batch_generate --prompts prompts.csv --out outputs/batch

The file is text (a prompt a line), CSV, JSON lines or Parquet. A row may hold the fields of an API request: prompt,
negative_prompt, size, num_inference_steps, guidance_scale, seed, sampler, n, output_format, output_compression, and
those of the model. It may begin from an image: columns image and mask, each the path of a file or its bytes, and
strength. The pictures appear in images/ of --out. At the end come manifest.jsonl and manifest.parquet. They
have a record for each row: its pictures, or its error. The same job, submitted again, draws only what is not finished.
"""

import dataclasses
import json
import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from app.api.protocol import SIZE_FIELDS
from cluster.cli import Parser, UsageError, UserError, integer_between
from cluster.ray_client import connect
from cluster.terminal import format_duration, say
from jobs.batch_worker import BatchWorker, folders, text_of
from jobs.entry import path, run
from jobs.prompts import InvalidRow, Row, read
from jobs.replica_config import ReplicaConfig, config_path, resources, waiting_message
from jobs.unfinished import unfinished_folder, write

CALLS = 2  # concurrent calls of an actor: the next block starts while the last pictures of a block are made
BLOCKS = 2000  # at most; longer files have larger blocks
PROGRESS_S = 5.0  # between two lines of progress
SHOWN = 5  # invalid rows that are printed; the manifest has all

SCHEMA = {
    **{"row": "int64", "key": "string", "prompt": "string", "negative_prompt": "string", "seed": "int64"},
    **{
        "sampler": "string",
        "num_inference_steps": "int64",
        "guidance_scale": "float64",
        "size": "string",
        "n": "int64",
    },
    **{"prompt_truncated": "bool", "negative_prompt_truncated": "bool", "n": "int64", "files": "list<string>"},
    **{name: "float64" for name in ("queue_s", "denoise_s", "decode_s", "encode_s", "device_s", "ended")},
    **dict.fromkeys(SIZE_FIELDS, "string"),
    "strength": "float64",
    "host": "string",
    "error": "string",
}


def main() -> str:
    parser = Parser(__doc__)
    parser.add_argument("--prompts", type=path, required=True, help=".txt, .csv, .jsonl or .parquet")
    parser.add_argument("--out", type=path, required=True, help="folder that the head and all TPU hosts share")
    parser.add_argument(
        "--config", type=config_path, default="serve_config.yaml", help="config whose args to use (%(default)s)"
    )
    parser.add_argument(
        "--hosts", type=integer_between(1, 1024), default=4, help="most TPU hosts at once (%(default)s)"
    )
    args = parser.parse_args()

    config = ReplicaConfig.read(args.config)
    rows, invalid = read_all(args.prompts, config)
    for row in invalid[:SHOWN]:
        say(f"row {row.number} is skipped: {row.error}")
    if len(invalid) > SHOWN:
        say(f"... and {len(invalid) - SHOWN} more; the manifest has all")
    errors = draw(rows, config, args.out, args.hosts)
    records = write_manifest(args.out, rows, invalid, errors)
    pictures = sum(len(record["files"]) for record in records)
    made = f"{pictures} pictures of {len(rows) - len(errors)} rows are in {args.out}, {len(invalid)} rows were skipped."
    if errors:
        number, error = next((row.number, errors[row.key]) for row in rows if row.key in errors)
        raise UserError(
            f"{made} {len(errors)} rows failed, such as row {number}: {error} The same job tries them again."
        )
    return made


def read_all(prompts: Path, config: ReplicaConfig) -> tuple[list[Row], list[InvalidRow]]:
    rows: list[Row] = []
    invalid: list[InvalidRow] = []
    for row in read(prompts, config):
        rows.append(row) if isinstance(row, Row) else invalid.append(row)
    if not rows and not invalid:
        raise UsageError(f"--prompts: {prompts} has no rows.")
    return rows, invalid


def draw(rows: Sequence[Row], config: ReplicaConfig, out: Path, hosts: int) -> dict[str, str]:
    """Draws the rows that are not finished in `out`. Returns the errors of those that failed, by key."""
    folders(out)
    present = {f"{name}/{file.name}" for name in ("images", "rows") for file in (out / name).iterdir()}
    left = [row for row in rows if not present.issuperset(row.made)]
    say(f"{len(rows)} rows: {len(rows) - len(left)} finished before, {len(left)} to draw")
    if not left:
        return {}
    with unfinished_folder(out) as unfinished:
        return draw_on_hosts(left, config, out, unfinished, hosts)


def draw_on_hosts(
    rows: Sequence[Row], config: ReplicaConfig, out: Path, unfinished: Path, hosts: int
) -> dict[str, str]:
    """Draws the rows in small blocks, so that hosts that join late get their share."""
    connect()
    import ray
    from ray.data import ActorPoolStrategy

    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it logs its plans and progress bars at lower levels
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.max_consecutive_actor_init_deaths = 3  # a node may go while it loads
    sizes = sorted({(row.generation.width, row.generation.height) for row in rows})
    spec = dataclasses.replace(config.full_batch_spec, sizes=tuple(sizes))
    size = max(1, spec.num_slots, math.ceil(len(rows) / BLOCKS))
    blocks = math.ceil(len(rows) / size)
    began = time.monotonic()
    say(waiting_message(config.chips))
    items = [{"row": text_of(row)} for row in rows]
    drawn = ray.data.from_items(items, override_num_blocks=blocks).map_batches(
        BatchWorker,
        fn_constructor_args=(out, unfinished, config.name, spec, config.args.admission_gain),
        batch_size=None,  # a block
        compute=ActorPoolStrategy(
            min_size=1,
            max_size=min(hosts, math.ceil(blocks / CALLS)),
            max_concurrent_calls_per_actor=CALLS,
            max_tasks_in_flight_per_actor=2 * CALLS,
            enable_true_multi_threading=True,
        ),
        num_cpus=1,
        resources=resources(config.chips),
    )
    try:
        results = {result["key"]: result["error"] for result in progress(drawn.iter_rows(), len(rows), began)}
    except Exception as error:  # Ray wraps the actor's error in its own
        raise UserError(f"Drawing ended: {reason(error)} The same job goes on with what is left.") from None
    return {key: error for key, error in results.items() if error}


def reason(error: BaseException) -> str:
    """The last line of the innermost error."""
    while (inner := error.__cause__ or getattr(error, "cause", None)) is not None and inner is not error:
        error = inner
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def progress(results: Iterable[Mapping[str, Any]], total: int, began: float) -> Iterator[Mapping[str, Any]]:
    """Passes the results on, and prints a line of progress every few seconds."""
    hosts: set[str] = set()
    first, last, printed = math.inf, 0.0, began
    for done, result in enumerate(results, start=1):
        hosts.add(result["host"])
        first, last, now = min(first, result["ended"]), max(last, result["ended"]), time.monotonic()
        if done == 1:
            printed = now  # pictures come in batches, so a rate needs more than one
            say(f"The first rows are drawn after {format_duration(now - began)}")
        elif done == total or now - printed >= PROGRESS_S:
            printed, rate = now, (done - 1) / max(last - first, 1e-3)
            left = f", {format_duration((total - done) / rate)} left" if done < total else ""
            say(f"{done} of {total} rows, {rate:.2f} a second on {len(hosts)} host{'s' * (len(hosts) > 1)}{left}")
        yield result


def write_manifest(
    out: Path, rows: Sequence[Row], invalid: Sequence[InvalidRow], errors: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Writes a record for each row of the file, in the order of the file, as JSON lines and as Parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    empty: dict[str, Any] = dict.fromkeys(SCHEMA)
    records = []
    all_rows: list[Row | InvalidRow] = [*rows, *invalid]
    for row in sorted(all_rows, key=lambda row: row.number):
        if isinstance(row, InvalidRow):
            records.append({**empty, "row": row.number, "prompt": row.prompt, "files": [], "error": row.error})
        elif row.key in errors:
            known = {"key": row.key, "prompt": row.generation.prompt, "files": [], "error": errors[row.key]}
            records.append({**empty, "row": row.number, **known})
        else:
            records.append({**empty, "row": row.number, **json.loads((out / row.record).read_text())})
    types = {"int64": pa.int64(), "float64": pa.float64(), "bool": pa.bool_(), "string": pa.string()}
    schema = pa.schema([(name, types.get(kind, pa.list_(pa.string()))) for name, kind in SCHEMA.items()])
    table = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(records, schema=schema), table)
    write(out / "manifest.jsonl", "".join(json.dumps(record) + "\n" for record in records).encode())
    write(out / "manifest.parquet", table.getvalue().to_pybytes())
    return records


if __name__ == "__main__":
    run(main)
