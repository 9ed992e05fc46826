"""Compares the pictures of two variants of a config: their distances, their speed, and all of them side by side.

    python -m jobs.evaluate --reference "sampler=pndm num_inference_steps=50" --candidate "sampler=dpmpp_2m"
    python -m jobs.evaluate --reference dtype=float32 --candidate dtype=bfloat16 --prompts prompts.txt

Both draw the same prompts from the same seeds. A variant names request fields (sampler, num_inference_steps,
guidance_scale, size) and fields of the model (model, revision, dtype); the config has the rest. Without --prompts, the
prompts are held-out captions of the demo model, whose judge also counts the claims that each picture meets. Distances
are of pixels (PSNR) and of structure as people see it (SSIM, Wang et al. 2004). There is no learned metric.

Pictures are drawn as batch_generate draws them, and kept in --out. The same job, submitted again, draws what is
missing. Another candidate costs only its own pictures, and has a report of its own beside the others.
"""

import base64
import dataclasses
import hashlib
import html
import json
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from app.api.fields import literal
from app.api.protocol import NUMERIC_FIELDS, resolve
from app.api.settings import Encoding
from app.diffusion.images import encode
from app.types import Generation, InvalidField
from cluster.cli import Parser, UsageError, UserError, integer_between
from cluster.terminal import say
from demo.scenes import Scene, check
from jobs import batch_generate
from jobs.entry import path, run
from jobs.prompts import ROW_FIELDS, Row, read
from jobs.replica_config import ReplicaConfig, config_path
from jobs.unfinished import write

REQUEST = ("sampler", "num_inference_steps", "guidance_scale", "size")
MODEL = ("model", "revision", "dtype")
ENCODING = Encoding(output_format="png", png_level=1)  # nothing is lost
PARTS_S = ("queue_s", "denoise_s", "decode_s", "encode_s")  # from a row's submission to its end
STYLE = (
    "body{font:15px sans-serif;max-width:70em;margin:2em auto;background:#faf9f6;color:#2d2d34}"
    "table{border-collapse:collapse}td,th{padding:.3em 1em .3em 0;text-align:left}"
    "figure{display:inline-block;margin:.5em 1em .5em 0;vertical-align:top}img{width:16em;image-rendering:auto}"
    "figcaption{max-width:33em;font-size:13px}"
)


@dataclasses.dataclass(frozen=True)
class Variant:
    name: str  # as the user wrote it
    config: ReplicaConfig
    changes: Mapping[str, Any]  # fields of each Generation

    def rows(self, generations: Iterable[Generation]) -> list[Row]:
        """A row for each generation. Of two equal ones, both are drawn, as batch_generate does it."""
        changed = [dataclasses.replace(generation, **self.changes) for generation in generations]
        seen: Counter[Generation] = Counter()
        rows = []
        for number, generation in enumerate(changed, start=1):
            seen[generation] += 1
            rows.append(Row.of(self.config, number, generation, ENCODING, seen[generation]))
        return rows


@dataclasses.dataclass(frozen=True)
class Drawn:
    """The pictures of a variant, in the order of the prompts."""

    files: Sequence[Path]
    device_s: float  # of all pictures
    pictures_per_s: float

    @classmethod
    def read(cls, out: Path, rows: Sequence[Row]) -> "Drawn":
        """Takes the speed from the host that drew most of them. Between two submissions, no host draws."""
        records = [json.loads((out / row.record).read_text()) for row in rows]
        ((host, count),) = Counter(record["host"] for record in records).most_common(1)
        of_host = [record for record in records if record["host"] == host]
        began = min(record["ended"] - sum(record[part] for part in PARTS_S) for record in of_host)
        seconds = max(record["ended"] for record in of_host) - began
        files = [out / file for row in rows for file in row.files]
        return cls(files, sum(record["device_s"] for record in records), count / seconds)


@dataclasses.dataclass(frozen=True)
class Distances:
    """One value for each picture."""

    psnr: np.ndarray  # dB; infinite where two are the same
    ssim: np.ndarray  # 1 where two are the same
    within_one: np.ndarray  # share of values that differ by at most one grey level

    @classmethod
    def between(cls, references: Iterable[np.ndarray], candidates: Iterable[np.ndarray]) -> "Distances":
        """Pictures uint8 [H, W, 3], each as large as its partner."""
        return cls(*map(np.array, zip(*map(distance, references, candidates), strict=True)))


def distance(reference: np.ndarray, candidate: np.ndarray) -> tuple[float, float, float]:
    import dm_pix
    import jax.numpy as jnp

    a, b = (jnp.asarray(pixels, jnp.float32) / 255 for pixels in (reference, candidate))
    levels = np.abs(reference.astype(np.int16) - candidate.astype(np.int16))
    return float(dm_pix.psnr(a, b)), float(dm_pix.ssim(a, b)), float((levels <= 1).mean())


def main() -> str:
    parser = Parser(__doc__)
    parser.add_argument(
        "--reference", required=True, metavar="VARIANT", help="'name=value ...'; '': the config as it is"
    )
    parser.add_argument("--candidate", required=True, metavar="VARIANT", help="compared with it")
    parser.add_argument("--prompts", type=path, help="as of batch_generate (the demo model's held-out captions)")
    parser.add_argument(
        "--count", type=integer_between(1, 10_000), default=32, help="most pictures of each (%(default)s)"
    )
    parser.add_argument(
        "--config", type=config_path, default="serve_config.yaml", help="config whose args to use (%(default)s)"
    )
    parser.add_argument("--out", type=path, default="outputs/evaluate", help="folder of the report (%(default)s)")
    args = parser.parse_args()

    base = ReplicaConfig.read(args.config)
    variants = [variant_of(f"--{name}", getattr(args, name), base) for name in ("reference", "candidate")]
    judged = args.prompts is None
    scenes, generations = captions(args.count, base) if judged else ([], prompts_of(args.prompts, args.count, base))
    rows_of = [variant.rows(generations) for variant in variants]
    for reference, candidate in zip(*rows_of, strict=True):
        sizes = {(row.generation.width, row.generation.height) for row in (reference, candidate)}
        if len(sizes) > 1:
            raise UsageError("--reference and --candidate must draw pictures of one size.")
    for variant, rows in zip(variants, rows_of, strict=True):
        say(f"{variant.name}:")
        # One after the other on one host, so that neither slows the other down.
        if errors := batch_generate.draw(rows, variant.config, args.out, hosts=1):
            raise UserError(
                f"{len(errors)} pictures failed: {next(iter(errors.values()))} The same job tries them again."
            )
    drawn = [Drawn.read(args.out, rows) for rows in rows_of]
    distances = Distances.between(*(map(pixels_of, pictures.files) for pictures in drawn))
    table = [*figures(drawn, distances), *(claims(drawn, scenes) if judged else ())]
    for name, *values in table:
        say(f"{name:<42}" + "".join(f"{value:>16}" for value in values))
    key = comparison(rows_of)
    report = args.out / f"report-{key}.html"
    write(report, page(variants, generations, drawn, distances, table).encode())
    each = [
        {"prompt": generation.prompt, "seed": generation.seed, "ssim": float(ssim), "psnr": finite(psnr)}
        for generation, ssim, psnr in zip(generations, distances.ssim, distances.psnr, strict=True)
    ]
    write(args.out / f"figures-{key}.json", (json.dumps({"table": table, "pictures": each}, indent=2) + "\n").encode())
    return f"{len(generations)} pictures of each stand side by side in {report}."


def comparison(rows_of: Sequence[Sequence[Row]]) -> str:
    """Names the pictures that are compared, so that two comparisons in one folder keep their own reports."""
    keys = [[row.key for row in rows] for rows in rows_of]
    return hashlib.sha256(json.dumps(keys).encode()).hexdigest()[:12]


def variant_of(option: str, text: str, base: ReplicaConfig) -> Variant:
    try:
        pairs = [word.partition("=") for word in shlex.split(text)]
    except ValueError as error:
        raise UsageError(f"{option}: {error}, got {text}.") from None
    values: dict[str, Any] = {name: value for name, _, value in pairs}
    for name, equals, _ in pairs:
        if not equals or name not in (*REQUEST, *MODEL):
            raise UsageError(f"{option} must be name=value of {', '.join((*REQUEST, *MODEL))}, got {name}.")
    changed = {name: value for name, value in values.items() if name in MODEL}
    config = base.changed(changed, option) if changed else base  # `base` has read the weights already
    fields = {
        name: literal(value) if name in NUMERIC_FIELDS else value for name, value in values.items() if name in REQUEST
    }
    try:
        generation = resolve({"prompt": "x", "seed": 0, **fields}, config.service, ROW_FIELDS).generation
    except InvalidField as error:
        raise UsageError(f"{option}: {error.message}") from None
    attributes = {"size": ("width", "height")}
    names = [attribute for name in fields for attribute in attributes.get(name, (name,))]
    return Variant(text or "as the config says", config, {name: getattr(generation, name) for name in names})


def prompts_of(file: Path, count: int, base: ReplicaConfig) -> list[Generation]:
    rows = []
    for row in read(file, base):
        if not isinstance(row, Row):
            raise UsageError(f"--prompts: row {row.number} of {file}: {row.error}")
        rows.append(dataclasses.replace(row.generation, n=1))
    if not rows:
        raise UsageError(f"--prompts: {file} has no rows.")
    return rows[:count]


def captions(count: int, base: ReplicaConfig) -> tuple[list[Scene], list[Generation]]:
    """Scenes that the demo model's training never saw, half of them with two objects, and requests for them."""
    from demo import quality

    chosen = quality.captions("held_out", (count + 1) // 2, seed=0)
    chosen = [*chosen[: (count + 1) // 2], *chosen[(count + 1) // 2 :][: count // 2]]
    requests = [{"prompt": caption, "seed": seed} for seed, (_, caption) in enumerate(chosen)]
    return [scene for scene, _ in chosen], [
        resolve(request, base.service, ROW_FIELDS).generation for request in requests
    ]


def claims(drawn: Sequence[Drawn], scenes: Sequence[Scene]) -> list[tuple[str, ...]]:
    """Rows of the demo model's table: the number of captions for which each claim holds."""
    from demo import quality  # which imports JAX

    judged = [
        [(scene, check(pixels_of(file), scene)) for file, scene in zip(pictures.files, scenes, strict=True)]
        for pictures in drawn
    ]
    rows = []
    for bar in quality.BARS:
        counts = [bar.count(pictures) for pictures in judged]
        if counts[0][1]:
            rows.append((f"{bar.captions}, {bar.name}", *(f"{right}/{total}" for right, total in counts)))
    return rows


def figures(drawn: Sequence[Drawn], distances: Distances) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("", "reference", "candidate")]
    rows.append(("pictures per second", *(f"{pictures.pictures_per_s:.2f}" for pictures in drawn)))
    rows.append(("device seconds a picture", *(f"{pictures.device_s / len(pictures.files):.3f}" for pictures in drawn)))
    rows.append(("SSIM, mean (1 is the same)", "", f"{distances.ssim.mean():.4f}"))
    rows.append(("SSIM, least", "", f"{distances.ssim.min():.4f}"))
    rows.append(("PSNR, median (dB)", "", f"{np.median(distances.psnr):.2f}"))
    rows.append(("values within one grey level", "", f"{distances.within_one.mean():.1%}"))
    return rows


def page(
    variants: Sequence[Variant],
    generations: Sequence[Generation],
    drawn: Sequence[Drawn],
    distances: Distances,
    table: Sequence[Sequence[str]],
) -> str:
    """The report, in a file that needs no other. The pairs that differ most come first."""
    rows = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in table)
    pairs = "".join(
        f"<figure>{image(drawn[0].files[i])} {image(drawn[1].files[i])}<figcaption>"
        f"SSIM {distances.ssim[i]:.4f}, seed {generations[i].seed}: {html.escape(generations[i].prompt)}"
        "</figcaption></figure>"
        for i in np.argsort(distances.ssim)
    )
    names = "".join(
        f"<p>{side}: <code>{html.escape(variant.name)}</code></p>"
        for side, variant in zip(("Reference, left", "Candidate, right"), variants, strict=True)
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Evaluation</title><style>{STYLE}</style>'
        f"<h1>Evaluation</h1>{names}<table>{rows}</table>{pairs}</html>\n"
    )


def image(file: Path) -> str:
    content = base64.b64encode(encode(pixels_of(file), "webp", quality=90, png_level=0, text={})).decode()
    return f'<img alt="" src="data:image/webp;base64,{content}">'


def pixels_of(file: Path) -> np.ndarray:
    """uint8 [H, W, 3]"""
    with Image.open(file) as picture:
        return np.asarray(picture)


def finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


if __name__ == "__main__":
    run(main)
