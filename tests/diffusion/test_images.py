from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageFont

from app.diffusion.images import contact_sheet, encode, wrap

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8)
SMOOTH = np.broadcast_to(np.arange(0, 240, 6, dtype=np.uint8)[None, :, None], (24, 40, 3)).copy()


def file(pixels: np.ndarray, output_format: str, *, quality: int = 90, png_level: int = 6, **text: str) -> bytes:
    return encode(pixels, output_format, quality=quality, png_level=png_level, text=text)


def test_a_png_keeps_every_pixel_and_carries_text_in_any_script() -> None:
    image = Image.open(BytesIO(file(PIXELS, "png", prompt="日没\n\x7e", seed="7", negative_prompt="")))
    assert (image.format, image.size) == ("PNG", (40, 24))
    assert np.array_equal(np.asarray(image), PIXELS)
    assert image.info == {"prompt": "日没\n~", "seed": "7", "negative_prompt": ""}


@pytest.mark.parametrize("output_format", ["webp", "jpeg"])
def test_webp_and_jpeg_look_the_same_and_shrink_with_quality(output_format: str) -> None:
    image = Image.open(BytesIO(file(SMOOTH, output_format, quality=95)))
    assert (image.format, image.size) == (output_format.upper(), (40, 24))
    assert np.abs(np.asarray(image).astype(int) - SMOOTH).max() < 16
    sizes = [len(file(PIXELS, output_format, quality=quality)) for quality in (5, 60, 100)]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1] / 2


def test_png_level_trades_time_for_size_and_nothing_else() -> None:
    quick, small = file(SMOOTH, "png", png_level=0), file(SMOOTH, "png", png_level=9)
    assert len(small) < len(quick) / 2
    assert np.array_equal(np.asarray(Image.open(BytesIO(quick))), np.asarray(Image.open(BytesIO(small))))


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(ValueError, match="output_format must be png, webp or jpeg, got gif."):
        file(PIXELS, "gif")


def test_a_contact_sheet_shows_every_picture_in_reading_order_above_its_caption() -> None:
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0), (0, 200, 200)]
    pictures = [np.full((32, 32, 3), colour, np.uint8) for colour in colours]
    sheet = np.asarray(contact_sheet(pictures, ["a red square", "", "x" * 99, "b", "c"], columns=3, cell=64))
    shown = [
        colour for colour in colours for row in (38, 140) for x in (38, 108, 178) if tuple(sheet[row, x]) == colour
    ]
    assert shown == colours
    assert sheet.shape[1] == 6 + 3 * (64 + 6)
    below = sheet[6 + 64 : 6 + 64 + 30, 6:70]
    assert below.min() < 120, "no caption below the first picture"
    assert sheet[6 + 64 : 6 + 64 + 30, 76:140].min() > 240, "something below the second, which has none"


def test_a_sheet_takes_pictures_of_unlike_shapes() -> None:
    sheet = contact_sheet([Image.new("L", (10, 30)), PIXELS], ["tall", "wide"], cell=50)
    assert sheet.mode == "RGB" and sheet.height > 150


@pytest.mark.parametrize(("images", "captions"), [([], []), ([PIXELS], []), ([PIXELS], ["a", "b"])])
def test_pictures_without_their_captions_are_refused(images: list[np.ndarray], captions: list[str]) -> None:
    with pytest.raises(ValueError, match="must pair up"):
        contact_sheet(images, captions)


def test_no_line_of_a_caption_is_wider_than_its_picture_and_no_word_is_lost() -> None:
    font = ImageFont.load_default(16)
    caption = "a red house under a yellow sun at dusk, beside a green tree and a small blue boat"
    lines = wrap(caption, font, 128)
    assert " ".join(lines) == caption
    assert all(font.getlength(line) <= 128 for line in [*lines, *wrap("y" * 200, font, 128)])
