"""What a sampler is to the device: a table of coefficients, and the update that applies a row of it.

One step of any sampler, with latents x, model output o and fresh noise z:

    m_i     = p_i x_i + q_i o_i
    x_{i+1} = a_i x_i + sum_j b_ij m_{i-j} + n_i z_i

Knows nothing of any sampler, nor of schedules.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = Any  # a numpy or a JAX array; `update` uses only what both have
Float64: TypeAlias = npt.NDArray[np.float64]
Float32: TypeAlias = npt.NDArray[np.float32]

# PLMS is a fourth-order method, but its redone second step drops out of the history that the later steps read, so the
# fifth evaluation needs the first one: m_{i-4}.
HISTORY = 5


class Coefficients(NamedTuple):
    """One row per sample: p, q, a, n are [B]; b is [B, HISTORY], newest model output first."""

    p: Array
    q: Array
    a: Array
    n: Array
    b: Array


def update(latents: Array, noise_pred: Array, history: Array, noise: Array, row: Coefficients) -> tuple[Array, Array]:
    """One step for a batch in which every sample may have its own sampler and step. All is float32.

    `latents`, `noise_pred` and `noise` are [B, H, W, C]; `history` is [B, HISTORY - 1, H, W, C], newest first. A new
    request starts from a history of zeros. Its coefficients there are zero, but zero times inf would not be zero.
    """
    xp = latents.__array_namespace__()

    def column(coefficient: Array) -> Array:
        return coefficient.astype("float32").reshape(-1, 1, 1, 1)

    latents = latents.astype("float32")
    m = column(row.p) * latents + column(row.q) * noise_pred.astype("float32")
    history = xp.concatenate([m[:, None], history.astype("float32")], axis=1)  # [B, HISTORY, H, W, C]
    x = column(row.a) * latents + column(row.n) * noise.astype("float32")
    for j in range(HISTORY):
        x = x + column(row.b[:, j]) * history[:, j]
    return x, history[:, :-1]


@dataclass(frozen=True)
class SamplerTable:
    """A sampler as the device needs it: a row for each evaluation of the denoiser."""

    timesteps: Float32  # [N], the denoiser's timestep
    p: Float32  # [N]
    q: Float32  # [N]
    a: Float32  # [N]
    n: Float32  # [N]
    b: Float32  # [N, HISTORY]
    preview: Float32  # [N, 2], the denoised image after each step: x_0 ~ preview[i, 0] x_{i+1} + preview[i, 1] m_i
    levels: Float32  # [N, 2], an image as each row takes it: x_i ~ levels[i, 0] x_0 + levels[i, 1] noise
    initial_scale: float  # initial latents = initial_scale * noise

    def __len__(self) -> int:
        return len(self.timesteps)


def table_of(
    timesteps: Float64,
    *,
    p: Float64 | float,
    q: Float64 | float,
    a: Float64 | float,
    b: Sequence[Float64] | Float64,
    levels: tuple[Float64, Float64],
    n: Float64 | float = 0.0,
    preview: tuple[Float64 | float, Float64 | float] = (0.0, 1.0),
    initial_scale: float = 1.0,
) -> SamplerTable:
    """A table of columns of [N], or of numbers for all rows. `b` has up to HISTORY columns, newest output first.

    The default `preview` is for m = x_0.
    """
    rows = len(timesteps)
    history = np.zeros((rows, HISTORY))
    for j, column in enumerate(b):
        history[:, j] = column
    levels_of_rows = np.stack(levels, axis=-1)
    previews = np.stack([np.broadcast_to(weight, rows) for weight in preview], axis=-1)

    def frozen(column: Float64 | float, *shape: int) -> Float32:
        """Tables are cached and handed to every caller, so nobody may write to them."""
        single = np.broadcast_to(column, (rows, *shape)).astype(np.float32)
        assert np.isfinite(single).all()
        single.setflags(write=False)
        return single

    return SamplerTable(
        frozen(timesteps),
        *(frozen(p), frozen(q), frozen(a), frozen(n)),
        b=frozen(history, HISTORY),
        preview=frozen(previews, 2),
        levels=frozen(levels_of_rows, 2),
        initial_scale=initial_scale,
    )


def columns(table: SamplerTable, rows: int) -> tuple[Float32, Float32, Coefficients]:
    """What programs take of a table: timesteps, previews and coefficients, for as many rows as they were compiled."""
    coefficients = Coefficients(*(padded(getattr(table, name), rows) for name in Coefficients._fields))
    return padded(table.timesteps, rows), padded(table.preview, rows), coefficients


def padded(column: Float32, rows: int) -> Float32:
    """A column of a table, with zeros up to the number of rows that programs take."""
    longer = np.zeros((rows, *column.shape[1:]), np.float32)
    longer[: len(column)] = column
    return longer
