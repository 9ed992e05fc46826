"""Products as libtpu writes them: the texts are from SD 2.1's UNet at 768x768, compiled for a v5e."""

import pytest

from capacity.flops import matrix
from capacity.hlo import parse
from capacity.hlo_products import padded_flops

TILE = 128
CASES = {
    # left, right, result, attributes, the same as (batch, rows, inner, columns)
    "linear layer": (
        ("2,9216,320", "320,640,1", "2,9216,640", "window={size=1}, dim_labels=0bf_io0->0bf"),
        (1, 2 * 9216, 320, 640),
    ),
    "convolution, of which all taps meet a pixel": (
        ("2,50,50,320", "3,3,320,640", "2,48,48,640", "window={size=3x3}, dim_labels=b01f_01io->b01f"),
        (9, 2 * 48 * 48, 320, 640),
    ),
    "convolution of every second pixel, with zeros around": (
        ("1,4,4,8", "3,3,8,8", "1,2,2,8", "window={size=3x3 stride=2x2 pad=1_1x1_1}, dim_labels=b01f_01io->b01f"),
        (2.5 * 2.5, 2 * 2, 8, 8),
    ),
    "queries by keys, for each row and head": (
        (
            "2,576,20,64",
            "2,64,20,576",
            "2,20,576,576",
            "window={size=2x20 stride=1x19 lhs_dilate=2x20}, dim_labels=0b1f_0i1o->01bf",
        ),
        (2 * 20, 576, 64, 576),
    ),
    "sum over two axes": (
        ("10,576,64", "10,64,640", "1,576,640", "window={size=10}, dim_labels=0bf_0io->0bf"),
        (1, 576, 10 * 64, 640),
    ),
    "columns in two axes": (
        ("1,576,64", "10,64,64", "10,576,64", "window={size=10 pad=9_9 rhs_reversal=1}, dim_labels=0bf_0io->0bf"),
        (1, 576, 64, 10 * 64),
    ),
    "groups": (
        ("2,8,8,64", "1,1,16,128", "2,8,8,128", "window={size=1x1}, dim_labels=b01f_01io->b01f, feature_group_count=4"),
        (4, 2 * 8 * 8, 16, 32),
    ),
}


@pytest.mark.parametrize("product, sides", CASES.values(), ids=CASES)
def test_a_product_counts_as_its_padded_matrices(
    product: tuple[str, str, str, str], sides: tuple[float, int, int, int]
) -> None:
    left, right, result, attributes = product
    text = f"""\
ENTRY %main (a: bf16[{left}], w: bf16[{right}]) -> bf16[{result}] {{
  %a = bf16[{left}]{{0}} parameter(0)
  %w = bf16[{right}]{{0}} parameter(1)
  ROOT %p = bf16[{result}]{{0}} convolution(%a, %w), {attributes}
}}
"""
    computations, entry = parse(text)
    assert padded_flops(entry, computations, TILE, {}) == matrix(*sides, TILE).padded_flops


def test_a_dot_counts_as_its_padded_matrices() -> None:
    text = """\
ENTRY %main (a: f32[6,100,40], w: f32[6,40,200]) -> f32[6,100,200] {
  %a = f32[6,100,40]{2,1,0} parameter(0)
  %w = f32[6,40,200]{2,1,0} parameter(1)
  ROOT %p = f32[6,100,200]{2,1,0} dot(%a, %w), lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0}, \
rhs_contracting_dims={1}
}
"""
    computations, entry = parse(text)
    assert padded_flops(entry, computations, TILE, {}) == matrix(6, 100, 40, 200, TILE).padded_flops
