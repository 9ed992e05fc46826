"""Reads the header of an image file: format, size, orientation. No decoder sees a file before.

Knows PNG (ISO/IEC 15948), JPEG (ITU-T T.81) and the container of WebP (RFC 9649) as far as the header goes. Each walk
over a file is linear in its bytes and ends early where a file has more parts than any encoder writes.
"""

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NoReturn

Format = Literal["PNG", "JPEG", "WEBP"]

# Decoders work through all parts of a file, so a file of many small parts would keep them busy for hours.
PNG_CHUNKS = 20_000
JPEG_SEGMENTS = 2_000
JPEG_SCANS = 100  # a progressive file has about ten; each passes over the whole picture
EXIF_BYTES = 1 << 20

PNG_START = b"\x89PNG\r\n\x1a\n"
# What a picture's pixels depend on. Text, times and the frames of an animation are left out.
PNG_KEPT = (b"IHDR", b"PLTE", b"tRNS", b"iCCP", b"IDAT", b"IEND")
JPEG_SIZES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # SOF0 to SOF15
# Of the application segments, Exif and XMP are left out: Pillow joins those of a file to one of any length, and reading
# a directory in it takes as much memory as its entries claim together. APP0 is JFIF, APP2 ICC, APP14 Adobe.
JPEG_KEPT = {*range(0xC0, 0xE0), 0xE0, 0xE2, 0xEE, 0xFE}


class BadImage(ValueError):
    """A file that is no image, or none that is read. The message is a clause whose subject is the file."""


@dataclass(frozen=True)
class Header:
    format: Format
    stored: tuple[int, int]  # width and height in the file
    orientation: int  # Exif's: 1 to 8
    picture: bytes  # the file without its metadata
    rows: tuple[bytes, ...] = ()  # of a PNG, its compressed rows

    @property
    def size(self) -> tuple[int, int]:
        """Width and height as people see the picture."""
        width, height = self.stored
        return (height, width) if self.orientation >= 5 else (width, height)


def read_header(file: bytes) -> Header:
    """Raises BadImage. The content decides the format, whatever the client calls the file."""
    if file.startswith(PNG_START):
        header = png_header(file)
    elif file.startswith(b"\xff\xd8\xff"):
        header = jpeg_header(file)
    elif file.startswith(b"RIFF") and file[8:12] == b"WEBP":
        header = webp_header(file)
    else:
        raise BadImage("must be a PNG, JPEG or WebP file" if file else "is empty")
    if 0 in header.stored:
        raise BadImage("has no pixels: its header says {} x {}".format(*header.stored))
    return header


def png_header(file: bytes) -> Header:
    kept, data, exif, size, kind = [PNG_START], [], b"", (0, 0), b""
    for number, (kind, start, end) in enumerate(png_chunks(file)):
        if (number == 0) != (kind == b"IHDR") or (number == 0 and end - start != 13):
            raise BadImage("is no valid PNG: it does not begin with its header")
        if number == 0:
            size = struct.unpack_from(">II", file, start)
        if kind == b"eXIf":
            exif = file[start:end]
        if kind == b"IDAT":
            data.append(file[start:end])
        if kind in PNG_KEPT:
            if zlib.crc32(file[start - 4 : end]) != int.from_bytes(file[end : end + 4]):
                raise BadImage(f"is corrupt: the checksum of its {kind.decode()} chunk is wrong")
            kept.append(file[start - 8 : end + 4])
        if number >= PNG_CHUNKS:
            raise BadImage(f"has over {PNG_CHUNKS} chunks")
    if kind != b"IEND":
        truncated()
    return Header("PNG", size, orientation_of(exif), b"".join(kept), tuple(data))


def png_chunks(file: bytes) -> Iterator[tuple[bytes, int, int]]:
    """The kind of each chunk and where its data are, up to the end of the picture."""
    at, kind = len(PNG_START), b""
    while kind != b"IEND" and at < len(file):
        length, kind = int.from_bytes(file[at : at + 4]), file[at + 4 : at + 8]
        if at + length + 12 > len(file):
            truncated()
        yield kind, at + 8, at + 8 + length
        at += length + 12


def jpeg_header(file: bytes) -> Header:
    kept, exif, sizes = [file[:2]], b"", []
    for number, (marker, start, end) in enumerate(jpeg_segments(file)):
        if marker in JPEG_SIZES and end - start >= 5:
            height, width = struct.unpack_from(">HH", file, start + 1)
            sizes.append((width, height))
        if marker == 0xE1 and not exif and file[start : start + 6] == b"Exif\0\0":
            exif = file[start + 6 : end]
        if marker in JPEG_KEPT and (marker != 0xE2 or file[start : start + 11] == b"ICC_PROFILE"):
            kept.append(file[start - 4 : end])
        if number >= JPEG_SEGMENTS:
            raise BadImage(f"has over {JPEG_SEGMENTS} segments before its picture")
    if len(sizes) != 1:
        raise BadImage(f"is no valid JPEG: its header has {len(sizes)} sizes instead of one")
    rest = file[end:]
    if (scans := rest.count(b"\xff\xda") + 1) > JPEG_SCANS:
        raise BadImage(f"has {scans} scans, and at most {JPEG_SCANS} are read")
    return Header("JPEG", sizes[0], orientation_of(exif), b"".join([*kept, rest]))


def jpeg_segments(file: bytes) -> Iterator[tuple[int, int, int]]:
    """The marker of each segment and where its data are, up to the start of the first scan."""
    at, marker = 2, 0
    while marker != 0xDA:
        while file[at : at + 2] == b"\xff\xff":  # fill bytes
            at += 1
        if at + 4 > len(file):
            truncated()
        marker, length = file[at + 1], int.from_bytes(file[at + 2 : at + 4])
        if file[at] != 0xFF or length < 2:
            raise BadImage("is no valid JPEG: a segment does not begin where the one before ends")
        if at + 2 + length > len(file):
            truncated()
        yield marker, at + 4, at + 2 + length
        at += 2 + length


def webp_header(file: bytes) -> Header:
    length = int.from_bytes(file[4:8], "little")
    if length + 8 > len(file):
        truncated()
    size, exif, at, chunks = (0, 0), b"", 12, 0
    while at + 8 <= length + 8:
        kind, count = file[at : at + 4], int.from_bytes(file[at + 4 : at + 8], "little")
        start, end = at + 8, at + 8 + count
        if end > len(file):
            truncated()
        if at == 12:
            size = webp_size(kind, file[start : start + 10])
        if kind == b"EXIF":
            exif = file[start:end].removeprefix(b"Exif\0\0")
        at, chunks = end + count % 2, chunks + 1
        if chunks > PNG_CHUNKS:
            raise BadImage(f"has over {PNG_CHUNKS} chunks")
    return Header("WEBP", size, orientation_of(exif), file[: length + 8])


def webp_size(kind: bytes, data: bytes) -> tuple[int, int]:
    """From the first chunk: that of a lossy, a lossless or an extended file."""
    if len(data) < (5 if kind == b"VP8L" else 10):
        truncated()
    if kind == b"VP8X":
        return int.from_bytes(data[4:7], "little") + 1, int.from_bytes(data[7:10], "little") + 1
    if kind == b"VP8L":
        bits = int.from_bytes(data[1:5], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 6)
        return width & 0x3FFF, height & 0x3FFF
    raise BadImage("is no valid WebP: it does not begin with a picture")


def orientation_of(exif: bytes) -> int:
    """Exif's orientation (CIPA DC-008, 4.6.5), 1 where there is none that can be read. Looks at one directory only."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None or len(exif) > EXIF_BYTES:
        return 1
    try:
        (start,) = struct.unpack_from(order + "I", exif, 4)
        (count,) = struct.unpack_from(order + "H", exif, start)
        for entry in range(min(count, 1000)):
            tag, kind, number, value = struct.unpack_from(order + "HHIH", exif, start + 2 + 12 * entry)
            if (tag, kind, number) == (0x0112, 3, 1):
                return value if 1 <= value <= 8 else 1
    except struct.error:  # a directory that is cut off
        pass
    return 1


def truncated() -> NoReturn:
    raise BadImage("is truncated: it ends before its picture does")
