"""Files of every kind become the pixels that people see, and hostile ones are refused before they cost anything."""

import random
import struct
import tracemalloc
import zlib
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from app.api.images_in.decode import mask_of, pixels_of
from app.api.images_in.headers import JPEG_SCANS, PNG_CHUNKS, BadImage, Header, read_header
from app.api.images_in.png_rows import PASSES, has_all_rows
from app.api.images_in.sizes import fit, nearest_size
from app.types import Pixels, Size
from tests.api.image_files import chunk, exif, file_of, gradient, mask_file, png, swapped_profile

SHAPE = (48, 32)  # width and height
PICTURE = gradient(*SHAPE)


def seen(file: bytes, size: Size = SHAPE) -> Pixels:
    return pixels_of(read_header(file), size)


def apart(image: Pixels, other: Pixels) -> int:
    assert image.shape == other.shape and image.dtype == np.uint8
    return int(np.abs(image.astype(int) - other).max())


@pytest.mark.parametrize(
    ("file", "tolerance"),
    [
        (file_of(PICTURE), 0),
        (file_of(PICTURE, "WEBP", lossless=True), 0),
        (file_of(PICTURE, "WEBP", quality=95), 16),
        (file_of(PICTURE, "JPEG", quality=100, subsampling=0), 6),
        (file_of(PICTURE, "JPEG", quality=100, subsampling=0, progressive=True), 6),
        (file_of(Image.fromarray(PICTURE).convert("RGBA")), 0),
        (file_of(Image.fromarray(PICTURE).convert("RGBA"), "WEBP", lossless=True), 0),
    ],
)
def test_each_format_is_read_by_its_content(file: bytes, tolerance: int) -> None:
    assert apart(seen(file), PICTURE) <= tolerance


def test_gray_palette_and_sixteen_bit_pictures_are_read() -> None:
    levels = np.arange(48 * 32, dtype=np.uint16).reshape(32, 48) * 42
    deep = file_of(Image.fromarray(levels))
    assert np.array_equal(seen(deep), np.repeat((levels >> 8).astype(np.uint8)[..., None], 3, -1))
    gray = Image.fromarray((levels >> 8).astype(np.uint8))
    assert np.array_equal(seen(file_of(gray)), seen(deep))
    for mode in ("1", "LA"):
        assert np.array_equal(seen(file_of(gray.convert(mode))), np.asarray(gray.convert(mode).convert("RGB")))
    palette = Image.fromarray(PICTURE).convert("P")
    assert np.array_equal(seen(file_of(palette)), np.asarray(palette.convert("RGB")))
    assert apart(seen(file_of(Image.fromarray(PICTURE).convert("CMYK"), "JPEG", quality=100)), PICTURE) < 30


def test_what_is_transparent_is_white_paper() -> None:
    image = Image.fromarray(PICTURE).convert("RGBA")
    image.paste((10, 20, 30, 0), (0, 0, 24, 32))
    image.paste((0, 0, 0, 128), (24, 0, 48, 16))
    for file in (file_of(image), file_of(image, "WEBP", lossless=True, exact=True)):
        pixels = seen(file)
        assert (pixels[:, :24] == 255).all() and (abs(pixels[:16, 24:].astype(int) - 127) <= 1).all()
        assert np.array_equal(pixels[16:, 24:], PICTURE[16:, 24:])
    keyed = file_of(Image.fromarray(np.zeros((32, 48), np.uint16)), transparency=0)
    assert (seen(keyed) == 255).all()
    palette = Image.fromarray(PICTURE).quantize(8)
    palette.paste(3, (0, 0, 24, 32))
    assert (seen(file_of(palette, transparency=3))[:, :24] == 255).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_as_its_exif_says(kind: str, orientation: int) -> None:
    stored = np.rot90(PICTURE, 1) if orientation in (6, 8) else PICTURE
    options = {"quality": 95} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    header = read_header(file_of(np.ascontiguousarray(stored), kind, exif=exif(orientation), **options))
    turns = {
        **{1: lambda p: p, 2: np.fliplr, 3: lambda p: np.rot90(p, 2), 4: np.flipud},
        **{5: lambda p: p.transpose(1, 0, 2), 6: lambda p: np.rot90(p, -1)},
        **{7: lambda p: np.rot90(p, 2).transpose(1, 0, 2), 8: lambda p: np.rot90(p, 1)},
    }
    expected = turns[orientation](stored)
    assert header.size == expected.shape[1::-1]
    assert apart(pixels_of(header, header.size), expected) <= (30 if kind == "JPEG" else 0)


def test_a_colour_profile_is_converted_and_a_broken_one_ignored() -> None:
    red = Image.new("RGB", SHAPE, (250, 0, 0))
    for kind in ("PNG", "JPEG", "WEBP"):
        blue = seen(file_of(red, kind, icc_profile=swapped_profile(), quality=95))
        assert blue[0, 0, 2] > 230 and blue[0, 0, 0] < 40
        assert apart(seen(file_of(red, kind, icc_profile=b"no profile at all" * 9, quality=95)), np.asarray(red)) <= 6
    shown = seen(file_of(red.convert("RGBA"), icc_profile=swapped_profile()))
    assert apart(shown, seen(file_of(red, icc_profile=swapped_profile()))) == 0


def test_of_an_animation_the_first_frame_counts() -> None:
    frames = [Image.new("RGB", SHAPE, colour) for colour in ("red", "lime", "blue")]
    for kind, options in {"PNG": {}, "WEBP": {"lossless": True}}.items():
        file = file_of(frames[0], kind, save_all=True, append_images=frames[1:], duration=100, **options)
        assert np.array_equal(seen(file), np.asarray(frames[0]))


def test_a_picture_of_another_shape_is_scaled_until_it_covers_the_size_and_cropped_to_its_middle() -> None:
    wide = np.zeros((32, 96, 3), np.uint8)
    wide[:, 32:64] = 200
    assert (seen(file_of(wide), (32, 32)) == 200).all() and (seen(file_of(wide), (64, 64))[:, 9:-9] == 200).all()
    tall = file_of(np.ascontiguousarray(wide.transpose(1, 0, 2)))
    assert (seen(tall, (32, 32)) == 200).all()
    turned = file_of(wide, exif=exif(6))
    assert read_header(turned).size == (32, 96) and (seen(turned, (32, 32)) == 200).all()
    large = gradient(1600, 1200)
    for kind in ("PNG", "JPEG"):
        assert apart(seen(file_of(large, kind, quality=95), (160, 120)), gradient(160, 120)) <= 6


def test_auto_keeps_the_shape_in_the_nearest_declared_size() -> None:
    sizes = ("512x512", "768x512", "512x768", "256x256")
    chosen = {
        **{(500, 500): "512x512", (300, 300): "256x256", (4000, 3000): "768x512", (3000, 4000): "512x768"},
        **{(1000, 100): "768x512", (1100, 1000): "512x512"},
    }
    assert {picture: nearest_size(picture, sizes) for picture in chosen} == chosen
    assert fit((512, 512), (512, 512)) == "as it is"
    assert fit((1024, 1024), (512, 512)) == "scaled to 512x512"
    assert fit((640, 480), (512, 512)) == "scaled to 683x512, cropped to the middle 512x512"


def test_a_mask_is_true_where_it_is_transparent() -> None:
    expected = np.zeros((32, 48), bool)
    expected[4:20, 8:30] = True
    for kind in ("PNG", "WEBP"):
        header = read_header(mask_file(*SHAPE, (8, 4, 30, 20), kind))
        assert np.array_equal(mask_of(header, SHAPE), expected)
        assert np.array_equal(mask_of(header, (24, 16)), expected[::2, ::2])
    palette = Image.fromarray(PICTURE).quantize(4)
    palette.paste(1, (0, 0, *SHAPE))
    palette.paste(3, (8, 4, 30, 20))
    assert np.array_equal(mask_of(read_header(file_of(palette, transparency=3)), SHAPE), expected)


@pytest.mark.parametrize(
    ("file", "problem"),
    [(file_of(PICTURE), "alpha channel"), (file_of(PICTURE, "JPEG"), "alpha channel")]
    + [(mask_file(48, 32, (0, 0, 0, 0)), "transparent pixels")],
)
def test_a_mask_that_leaves_nothing_to_redraw_is_refused(file: bytes, problem: str) -> None:
    with pytest.raises(BadImage, match=problem):
        mask_of(read_header(file), SHAPE)


JPEG = file_of(PICTURE, "JPEG", quality=90)
PNG = file_of(PICTURE)
WEBP = file_of(PICTURE, "WEBP")


@pytest.mark.parametrize(
    ("file", "problem"),
    [
        (b"", "is empty"),
        (b"GIF89a" + bytes(50), "must be a PNG, JPEG or WebP"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "must be a PNG"),
        (b"RIFF\x10\0\0\0WAVEfmt ", "must be a PNG"),
        (PNG[:8], "truncated"),
        (PNG[:-13], "truncated"),
        (PNG[:60], "truncated"),
        (JPEG[:3], "truncated"),
        (JPEG[:200], "truncated"),
        (JPEG[: len(JPEG) // 2 + 300], "truncated"),
        (WEBP[:-9], "truncated"),
        (WEBP[:15], "truncated"),
        (PNG[:45] + bytes([PNG[45] ^ 1]) + PNG[46:], "checksum"),
        (png(40, 30, data=zlib.compress(bytes(41 * 10))), "truncated|corrupt"),
        (png(40, 30, data=b"not zlib"), "corrupt"),
        (png(40, 30, interlaced=True), "fewer rows"),
        (png(40, 30, data=b""), "fewer rows"),
        (png(0, 30), "no pixels"),
        (png(40, 30).replace(b"IHDR", b"IDHR"), "does not begin with its header"),
        (JPEG.replace(b"\xff\xc0", b"\xff\xc4"), "0 sizes|truncated|corrupt"),
        (b"\xff\xd8\xff\xe0\x00\x01", "truncated|segment"),
        (JPEG[:2] + b"\xff\xc0\x00\x0b\x08\x00\x10\x00\x10\x01\x01\x11\x00" + JPEG[2:], "2 sizes"),
    ],
)
def test_a_file_that_is_cut_off_or_lies_is_refused(file: bytes, problem: str) -> None:
    with pytest.raises(BadImage, match=problem):
        seen(file)


def test_a_decompression_bomb_is_recognised_by_its_header_alone() -> None:
    tracemalloc.start()
    try:
        sizes = [
            read_header(png(50_000, 50_000, data=zlib.compress(bytes(1 << 20)))).size,
            read_header(WEBP[:12] + b"VP8X\n\0\0\0\0\0\0\0" + b"\xfe\xff\xff" * 2 + WEBP[12:]).size,
            read_header(JPEG.replace(struct.pack(">HH", 32, 48), b"\xff\xff\xff\xff", 1)).size,
        ]
        assert sizes == [(50_000, 50_000), (2**24 - 1, 2**24 - 1), (65535, 65535)]
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_files_of_countless_small_parts_are_refused() -> None:
    with pytest.raises(BadImage, match="chunks"):
        read_header(png(8, 8, chunk(b"tEXt", b"") * (PNG_CHUNKS + 1)))
    scans = JPEG.index(b"\xff\xda")
    with pytest.raises(BadImage, match="scans"):
        read_header(JPEG[:-2] + JPEG[scans : scans + 20] * JPEG_SCANS + JPEG[-2:])
    with pytest.raises(BadImage, match="segments"):
        read_header(JPEG[:2] + b"\xff\xe1\x00\x02" * 3000 + JPEG[2:])


def test_metadata_that_claim_gigabytes_are_never_read() -> None:
    """Pillow joins the Exif segments of a JPEG, and reads a directory's entries whether or not they overlap."""
    count, claimed = 5000, 60_000
    directory = b"II*\0" + struct.pack("<IH", 8, count)
    directory += b"".join(struct.pack("<HHII", 1000 + i, 7, claimed, 8) for i in range(count))
    segments = b"".join(
        b"\xff\xe1" + struct.pack(">H", len(part) + 8) + b"Exif\0\0" + part
        for part in (directory[:65000], bytes(65000), bytes(65000))
    )
    header = read_header(JPEG[:2] + segments + JPEG[2:])
    assert b"Exif" not in header.picture and header.orientation == 1
    image = Image.open(BytesIO(header.picture))
    assert "exif" not in image.info and apart(pixels_of(header, SHAPE), seen(JPEG)) == 0


def test_whatever_is_wrong_with_a_file_is_a_bad_image() -> None:
    rng = random.Random(7)
    files = [JPEG, PNG, WEBP, mask_file(20, 20, (3, 3, 9, 9)), file_of(PICTURE, "JPEG", exif=exif(6), progressive=True)]
    refused = 0
    for _ in range(400):
        file = bytearray(rng.choice(files))
        for _ in range(rng.randint(1, 8)):
            file[rng.randrange(len(file))] = rng.randrange(256)
        try:
            header = read_header(bytes(file))
            if np.prod(header.size) < 1e6:
                assert pixels_of(header, (16, 16)).shape == (16, 16, 3)
        except BadImage:
            refused += 1
    assert refused > 100


def test_a_header_has_the_size_that_people_see() -> None:
    assert Header("JPEG", (10, 20), 6, b"").size == (20, 10) and Header("JPEG", (10, 20), 3, b"").size == (10, 20)


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize(("bits", "kind"), [(1, 0), (8, 0), (16, 0), (8, 2), (16, 2), (4, 3), (8, 4), (16, 6)])
def test_the_rows_of_a_png_are_counted(bits: int, kind: int, interlaced: bool) -> None:
    """PNGs of odd sizes, for which the passes of an interlaced file have each another width."""
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[kind]
    for width, height in ((1, 1), (5, 3), (13, 9)):
        total = 0
        for left, across, top, down in PASSES if interlaced else ((0, 1, 0, 1),):
            columns, rows = len(range(left, width, across)), len(range(top, height, down))
            total += rows * (1 + -(-columns * bits * channels // 8)) if columns else 0
        header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, interlaced)
        assert has_all_rows(header, (zlib.compress(bytes(total)),))
        assert not has_all_rows(header, (zlib.compress(bytes(total - 1)),))
        assert has_all_rows(header, [bytes([byte]) for byte in zlib.compress(bytes(total))])
