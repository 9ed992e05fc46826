"""Image files of every kind that clients send, made in memory."""

import base64
import struct
import zlib
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

from app.types import Pixels


def gradient(width: int, height: int) -> Pixels:
    """No two corners are alike, so that a turned or mirrored picture is another one."""
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return np.stack([across, down, 255 - across], -1).astype(np.uint8)


def file_of(image: Image.Image | Pixels, kind: str = "PNG", **options: Any) -> bytes:
    file = BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
    return file.getvalue()


def exif(orientation: int) -> bytes:
    """Exif with this orientation."""
    entry = struct.pack("<HHIHH", 0x0112, 3, 1, orientation, 0)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, 1) + entry + bytes(4)


def mask_file(width: int, height: int, box: tuple[int, int, int, int], kind: str = "PNG") -> bytes:
    """Opaque but for the box (left, top, right, bottom)."""
    image = Image.new("RGBA", (width, height), (0, 0, 0, 255))
    image.paste((0, 0, 0, 0), box)
    return file_of(image, kind, **({"lossless": True} if kind == "WEBP" else {}))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *chunks: bytes, data: bytes | None = None, interlaced: bool = False) -> bytes:
    """A grey PNG whose header says this size, whatever is in it."""
    rows = zlib.compress(bytes((width + 1) * height), 9) if data is None else data
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, interlaced))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def swapped_profile() -> bytes:
    """An ICC profile whose red is the blue of sRGB, and its blue the red. A gray value is the same gray."""
    red, green, blue = (0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141)
    colours = {b"rXYZ": blue, b"gXYZ": green, b"bXYZ": red, b"wtpt": (0.9642, 1.0, 0.8249)}
    tags = {
        name: b"XYZ " + bytes(4) + b"".join(struct.pack(">i", round(value * 65536)) for value in colour)
        for name, colour in colours.items()
    }
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(2.2 * 256)) + bytes(2)
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    table, data, start = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        table += name + struct.pack(">II", start + len(data), len(content))
        data += content
    header = bytearray(128)
    header[0:4] = struct.pack(">I", start + len(data))
    header[8:12], header[12:24], header[36:40] = bytes([2, 16, 0, 0]), b"mntrRGB XYZ ", b"acsp"
    header[68:80] = struct.pack(">iii", *(round(value * 65536) for value in colours[b"wtpt"]))
    return bytes(header) + table + data


def data_url(file: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(file).decode()}"
