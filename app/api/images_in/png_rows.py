"""Whether a PNG holds all the rows that its header promises. Pillow's decoder leaves missing ones black in silence."""

import struct
import zlib
from collections.abc import Sequence

CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type
# Adam7 (ISO/IEC 15948, 8.2): start and distance, across and down, of the pixels of each pass.
PASSES = ((0, 8, 0, 8), (4, 8, 0, 8), (0, 4, 4, 8), (2, 4, 0, 4), (0, 2, 2, 4), (1, 2, 0, 2), (0, 1, 1, 2))
PIECE = 1 << 18


def has_all_rows(header: bytes, data: Sequence[bytes]) -> bool:
    """Of the contents of an IHDR chunk and of the IDAT chunks. Keeps one piece in memory."""
    width, height, depth, colours, *_, interlaced = struct.unpack(">IIBBBBB", header)
    bits = depth * CHANNELS.get(colours, 1)
    passes = PASSES if interlaced else ((0, 1, 0, 1),)
    missing = 0
    for left, across, top, down in passes:
        columns, rows = -(-(width - left) // across), -(-(height - top) // down)
        if columns > 0 and rows > 0:
            missing += rows * (1 + (columns * bits + 7) // 8)
    inflate = zlib.decompressobj()
    try:
        for piece in data:
            while piece and missing > 0:
                missing -= len(inflate.decompress(piece, PIECE))
                piece = inflate.unconsumed_tail
    except zlib.error:
        return False
    return missing <= 0 or missing <= len(inflate.flush(PIECE))
