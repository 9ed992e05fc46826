"""Draws a file of prompts at full throughput, with Ray Data, on as many TPU hosts as the cluster gives.

    python -m jobs.batch_generate --prompts prompts.csv --out outputs/batch

The file is text (a prompt a line), CSV, JSON lines or Parquet; a row may say what a request to the API may: prompt,
negative_prompt, size, num_inference_steps, guidance_scale, seed, sampler, n, output_format, output_compression. In
--out appear images/, and at the end manifest.jsonl and manifest.parquet, a record for each row with its pictures or
with what is wrong with it. Submitted again, it draws what is not finished and nothing else.
"""

import dataclasses
import json
import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.cli import Parser, UsageError, UserError, integer_between
from cluster.ray_client import connect
from cluster.terminal import format_duration, say
from jobs.batch_worker import Painter, folders, text_of
from jobs.entry import path, run
from jobs.prompts import Bad, Row, read
from jobs.settings import Settings, config, resources, waiting
from jobs.unfinished import drafts, write

CALLS = 2  # of an actor at once: while one block's last pictures are made, the next block's are under way
BLOCKS = 2000  # most blocks; beyond them they grow
TOLD_S = 5.0  # from one line of progress to the next
SHOWN = 5  # bad rows that are told; the manifest has all

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
    "host": "string",
    "error": "string",
}


def main() -> str:
    parser = Parser(__doc__)
    parser.add_argument("--prompts", type=path, required=True, help=".txt, .csv, .jsonl or .parquet")
    parser.add_argument("--out", type=path, required=True, help="folder that the head and all TPU hosts see")
    parser.add_argument("--config", type=config, default="serve_config.yaml", help="whose args to take (%(default)s)")
    parser.add_argument(
        "--hosts", type=integer_between(1, 1024), default=4, help="most TPU hosts at once (%(default)s)"
    )
    args = parser.parse_args()

    settings = Settings.read(args.config)
    rows, bad = sorted_out(args.prompts, settings)
    for one in bad[:SHOWN]:
        say(f"row {one.number} is skipped: {one.error}")
    if len(bad) > SHOWN:
        say(f"... and {len(bad) - SHOWN} more; the manifest has all")
    errors = draw(rows, settings, args.out, args.hosts)
    records = write_manifest(args.out, rows, bad, errors)
    pictures = sum(len(record["files"]) for record in records)
    made = f"{pictures} pictures of {len(rows) - len(errors)} rows are in {args.out}, {len(bad)} rows were skipped."
    if errors:
        number, error = next((row.number, errors[row.key]) for row in rows if row.key in errors)
        raise UserError(
            f"{made} {len(errors)} rows failed, such as row {number}: {error} The same job tries them again."
        )
    return made


def sorted_out(prompts: Path, settings: Settings) -> tuple[list[Row], list[Bad]]:
    rows: list[Row] = []
    bad: list[Bad] = []
    for one in read(prompts, settings):
        rows.append(one) if isinstance(one, Row) else bad.append(one)
    if not rows and not bad:
        raise UsageError(f"--prompts: {prompts} has no rows.")
    return rows, bad


def draw(rows: Sequence[Row], settings: Settings, out: Path, hosts: int) -> dict[str, str]:
    """Draws those that are not finished in `out`. Returns what failed, by key."""
    folders(out)
    there = {f"{name}/{file.name}" for name in ("images", "rows") for file in (out / name).iterdir()}
    left = [row for row in rows if not there.issuperset(row.made)]
    say(f"{len(rows)} rows: {len(rows) - len(left)} finished before, {len(left)} to draw")
    if not left:
        return {}
    with drafts(out) as place:
        return on_hosts(left, settings, out, place, hosts)


def on_hosts(rows: Sequence[Row], settings: Settings, out: Path, place: Path, hosts: int) -> dict[str, str]:
    """Blocks are small, so that hosts which come late get their share."""
    connect()
    import ray
    from ray.data import ActorPoolStrategy

    logging.getLogger("ray.data").setLevel(logging.ERROR)  # below that it tells of its plans, and of progress bars
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.max_consecutive_actor_init_deaths = 3  # a node may go while it loads
    sizes = sorted({(row.generation.width, row.generation.height) for row in rows})
    spec = dataclasses.replace(settings.full_batch_spec, sizes=tuple(sizes))
    size = max(1, spec.num_slots, math.ceil(len(rows) / BLOCKS))
    blocks = math.ceil(len(rows) / size)
    began = time.monotonic()
    say(waiting(settings.chips))
    items = [{"row": text_of(row)} for row in rows]
    drawn = ray.data.from_items(items, override_num_blocks=blocks).map_batches(
        Painter,
        fn_constructor_args=(out, place, settings.name, spec, settings.args.admission_gain),
        batch_size=None,  # a block
        compute=ActorPoolStrategy(
            min_size=1,
            max_size=min(hosts, math.ceil(blocks / CALLS)),
            max_concurrent_calls_per_actor=CALLS,
            max_tasks_in_flight_per_actor=2 * CALLS,
            enable_true_multi_threading=True,
        ),
        num_cpus=1,
        resources=resources(settings.chips),
    )
    try:
        results = {one["key"]: one["error"] for one in progress(drawn.iter_rows(), len(rows), began)}
    except Exception as error:  # Ray wraps what an actor could not do in its own
        raise UserError(f"Drawing ended: {reason(error)} The same job goes on with what is left.") from None
    return {key: error for key, error in results.items() if error}


def reason(error: BaseException) -> str:
    """The words of the innermost error."""
    while (inner := error.__cause__ or getattr(error, "cause", None)) is not None and inner is not error:
        error = inner
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def progress(results: Iterable[Mapping[str, Any]], total: int, began: float) -> Iterator[Mapping[str, Any]]:
    """The same, with a line of progress now and then."""
    hosts: set[str] = set()
    first, last, told = math.inf, 0.0, began
    for done, one in enumerate(results, start=1):
        hosts.add(one["host"])
        first, last, now = min(first, one["ended"]), max(last, one["ended"]), time.monotonic()
        if done == 1:
            told = now  # pictures come in batches, so a rate needs more than one
            say(f"The first rows are drawn after {format_duration(now - began)}")
        elif done == total or now - told >= TOLD_S:
            told, rate = now, (done - 1) / max(last - first, 1e-3)
            left = f", {format_duration((total - done) / rate)} left" if done < total else ""
            say(f"{done} of {total} rows, {rate:.2f} a second on {len(hosts)} host{'s' * (len(hosts) > 1)}{left}")
        yield one


def write_manifest(
    out: Path, rows: Sequence[Row], bad: Sequence[Bad], errors: Mapping[str, str]
) -> list[dict[str, Any]]:
    """A record for each row of the file, in its order, as JSON lines and as Parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    empty: dict[str, Any] = dict.fromkeys(SCHEMA)
    records = []
    all_rows: list[Row | Bad] = [*rows, *bad]
    for one in sorted(all_rows, key=lambda one: one.number):
        if isinstance(one, Bad):
            records.append({**empty, "row": one.number, "prompt": one.prompt, "files": [], "error": one.error})
        elif one.key in errors:
            known = {"key": one.key, "prompt": one.generation.prompt, "files": [], "error": errors[one.key]}
            records.append({**empty, "row": one.number, **known})
        else:
            records.append({**empty, "row": one.number, **json.loads((out / one.record).read_text())})
    types = {"int64": pa.int64(), "float64": pa.float64(), "bool": pa.bool_(), "string": pa.string()}
    schema = pa.schema([(name, types.get(kind, pa.list_(pa.string()))) for name, kind in SCHEMA.items()])
    table = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(records, schema=schema), table)
    write(out / "manifest.jsonl", "".join(json.dumps(record) + "\n" for record in records).encode())
    write(out / "manifest.parquet", table.getvalue().to_pybytes())
    return records


if __name__ == "__main__":
    run(main)
