"""Makes malformed requests to POST /v1/images/edits: images that are cut off, corrupt or claim gigabytes, and bodies
that are no form. The same random numbers make the same bytes, with the same version of Pillow."""

import base64
import json
import random
import struct
import zlib
from collections.abc import Sequence
from functools import cache

from PIL import Image

from tests.api.image_files import chunk, exif, file_of, gradient, mask_file, png, swapped_profile

SIDE = 128
NAMES = ("image", "image[]", "image[0]", "mask", "images", "picture", "image[a]", "")
DISPOSITIONS = (
    b'form-data; name="%s"; filename="../../../etc/cron.d/x"',
    b'form-data; name="%s"; filename="a.png"; filename*=UTF-8\'\'%%2e%%2e%%2f',
    b'form-data; name="%s"',
    b"form-data; name=%s",
    b'attachment; name="%s"',
    b'form-data; name="%s"; name="prompt"',
    b'form-data; name="%s',
)


@cache
def good_files() -> tuple[bytes, ...]:
    picture = Image.fromarray(gradient(SIDE, SIDE))
    small = picture.resize((40, 30))
    return (
        file_of(picture),
        file_of(picture, "JPEG", quality=80),
        file_of(picture, "JPEG", quality=80, progressive=True, exif=exif(6)),
        file_of(picture, "WEBP", quality=60),
        file_of(small, "WEBP", lossless=True, exif=exif(3), icc_profile=swapped_profile()),
        file_of(small, icc_profile=swapped_profile(), exif=exif(8)),
        file_of(small.convert("P"), transparency=3),
        file_of(small.convert("CMYK"), "JPEG"),
        file_of(small.convert("1")),
        file_of(small, save_all=True, append_images=[small] * 3),
        file_of(small, "WEBP", save_all=True, append_images=[picture.resize((40, 30))] * 3, duration=9),
        mask_file(SIDE, SIDE, (30, 30, 90, 90)),
        mask_file(40, 30, (0, 0, 9, 9), "WEBP"),
    )


@cache
def hostile_files() -> tuple[bytes, ...]:
    """Each would cost a decoder memory or time out of proportion to its bytes."""
    jpeg, webp = good_files()[1:4:2]
    scan = jpeg.index(b"\xff\xda")
    entries = b"".join(struct.pack("<HHII", 1000 + i, 7, 60_000, 8) for i in range(5000))
    directory = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 5000) + entries
    bomb = zlib.compress(bytes(8 << 20), 9)
    return (
        png(50_000, 50_000, data=bomb),
        png(4_000, 4_000, data=bomb),
        png(2**31 - 1, 1, data=b""),
        png(SIDE, SIDE, *(chunk(b"zTXt", b"a\0\0" + bomb) for _ in range(20))),
        png(SIDE, SIDE, chunk(b"iCCP", b"a\0\0" + bomb)),
        png(SIDE, SIDE, *[chunk(b"tEXt", b"a\0b")] * 25_000),
        png(SIDE, SIDE, chunk(b"eXIf", directory[6:])),
        jpeg[:2] + (b"\xff\xe1" + struct.pack(">H", 65_000) + directory[:64_998]) * 3 + jpeg[2:],
        jpeg[:-2] + jpeg[scan : scan + 30] * 3000 + jpeg[-2:],
        jpeg.replace(struct.pack(">HH", SIDE, SIDE), b"\xff\xff\xff\xff", 1),
        webp[:12] + b"VP8X\n\0\0\0\x10\0\0\0" + b"\xff\x3f\0" * 2 + webp[12:],
        webp[:12] + b"VP8L\5\0\0\0\x2f\xff\xff\xff\x0f\0" + webp[12:],
        b"GIF89a" + struct.pack("<HH", 60_000, 60_000) + bytes(99),
        b'<svg xmlns="http://www.w3.org/2000/svg" width="99999" height="99999"/>',
        b"II*\0" + bytes(500),
        b"8BPS\0\1" + bytes(500),
    )


def image_file(rng: random.Random) -> bytes:
    file = rng.choice(good_files()) if rng.random() < 0.8 else rng.choice(hostile_files())
    match rng.randrange(9):
        case 0:
            return file[: rng.randrange(len(file))]
        case 1 | 2 | 3:
            changed = bytearray(file)
            for _ in range(rng.choice([1, 3, 30])):
                changed[rng.randrange(len(changed))] = rng.randrange(256)
            return resealed(bytes(changed)) if rng.random() < 0.7 else bytes(changed)
        case 4:  # mostly the header
            at = rng.randrange(min(len(file), 64))
            return file[:at] + rng.randbytes(rng.choice([1, 2, 4])) + file[at + rng.choice([0, 1, 4]) :]
        case 5:
            other = rng.choice(good_files())
            return file[: len(file) // 2] + other[len(other) // 2 :]
        case 6:
            return file + rng.choice([bytes(100_000), file, b"<script>"])
    return file


def resealed(file: bytes) -> bytes:
    """A PNG with right checksums again, so that a decoder gets to see what is wrong with it."""
    sealed, at = bytearray(file), 8
    while file.startswith(b"\x89PNG") and at + 12 <= len(file):
        end = at + 8 + int.from_bytes(file[at : at + 4])
        sealed[end : end + 4] = zlib.crc32(file[at + 4 : end]).to_bytes(4)
        at = end + 4
    return bytes(sealed[: len(file)])


def form(rng: random.Random, texts: Sequence[tuple[str, bytes]]) -> tuple[bytes, bytes]:
    """A body and its Content-Type."""
    boundary = rng.choice([b"a", b"----WebKitFormBoundary", b"-" * 70, rng.randbytes(4).hex().encode()])
    parts = [(name.encode("utf-8", "replace"), content) for name, content in texts]
    parts += [(b"image", image_file(rng))]
    if rng.random() < 0.3:
        parts += [(b"mask", image_file(rng))]
    if rng.random() < 0.1:
        parts += [(rng.choice(NAMES).encode(), image_file(rng)) for _ in range(rng.choice([1, 2, 20]))]
        rng.shuffle(parts)
    body = b""
    for name, content in parts:
        disposition = rng.choice(DISPOSITIONS) if rng.random() < 0.05 else DISPOSITIONS[0]
        lines = [b"--" + boundary, b"Content-Disposition: " + disposition % name]
        if rng.random() < 0.03:
            odd = [
                b"Content-Type: image/svg+xml",
                b"Content-Transfer-Encoding: base64",
                b"X: " + b"a" * 5000,
                b":",
                b"X",
            ]
            lines += rng.choices(odd, k=rng.choice([1, 12]))
        body += b"\r\n".join([*lines, b"", content, b""])
    body += b"--" + boundary + b"--\r\n"
    kind = b"multipart/form-data; boundary=" + boundary
    match rng.randrange(30):
        case 0:
            body = body[: rng.randrange(len(body))]
        case 1:
            at = rng.randrange(len(body))
            body = body[:at] + rng.choice([b"\r\n--" + boundary, b"\r\n", b"\0", b"--"]) + body[at:]
        case 2:
            body = body.replace(b"\r\n", rng.choice([b"\n", b"\r", b"\r\r\n"]), rng.choice([1, 5, -1]))
        case 3:
            kind = rng.choice(
                [b"multipart/form-data", b"multipart/mixed; boundary=" + boundary, kind + b"x", kind + b";" * 500]
                + [b'multipart/form-data; boundary="', b"multipart/form-data; boundary=" + b"a" * 300, b"text/plain"]
            )
    return body, kind


def links(rng: random.Random, values: dict[str, object]) -> bytes:
    """A body of JSON, whose images are data: URLs."""

    def link() -> object:
        content = base64.b64encode(image_file(rng)).decode()
        url = rng.choice(["data:image/png;base64,"] * 20 + ["data:;base64,", "data:image/png,", "DATA:", ""]) + content
        if rng.random() < 0.1:
            url = rng.choice(
                [
                    "http://127.0.0.1:8265/",
                    "http://169.254.169.254/",
                    "file:///etc/passwd",
                    "data:",
                    url[:-3],
                    url + "=",
                ]
            )
        return rng.choice([{"image_url": url}] * 60 + [url, {"file_id": "a"}, {"image_url": [url]}, [], None, 7, {}])

    images = [link()] if rng.random() < 0.8 else rng.choice([[link(), link()], [link()] * 40, link(), [[]], None])
    masks = {"mask": link()} if rng.random() < 0.3 else {}
    return json.dumps({"images": images, **masks, **values}).encode("utf-8", "surrogatepass")
