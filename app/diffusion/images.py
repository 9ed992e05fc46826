"""Pixels to files, and to sheets of captioned pictures for people to look at. Knows nothing of models or requests."""

from collections.abc import Mapping, Sequence
from io import BytesIO

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

Pixels = npt.NDArray[np.uint8]  # [H, W, 3]

PAPER, INK = (250, 249, 246), (45, 45, 52)


def encode(pixels: Pixels, output_format: str, *, quality: int, png_level: int, text: Mapping[str, str]) -> bytes:
    """An image as a PNG with `text` in it, or as a WebP or JPEG of this quality without text."""
    file = BytesIO()
    image = Image.fromarray(pixels)
    if output_format == "png":
        image.save(file, "PNG", compress_level=png_level, pnginfo=chunks(text))
    elif output_format == "jpeg":
        image.save(file, "JPEG", quality=quality, subsampling=0 if quality >= 90 else 2)
    elif output_format == "webp":
        image.save(file, "WEBP", quality=quality)
    else:
        raise ValueError(f"output_format must be png, webp or jpeg, got {output_format}.")
    return file.getvalue()


def chunks(text: Mapping[str, str]) -> PngInfo:
    """tEXt chunks, or iTXt (UTF-8) for what Latin-1 cannot write; readers show both alike."""
    info = PngInfo()
    for key, value in text.items():
        info.add_text(key, value)
    return info


def contact_sheet(
    images: Sequence[Pixels | Image.Image], captions: Sequence[str], *, columns: int = 4, cell: int = 256
) -> Image.Image:
    """Pictures in rows on one page, each scaled to `cell` pixels in width, with its caption wrapped below it."""
    if not images or len(images) != len(captions):
        raise ValueError(f"images and captions must pair up, got {len(images)} images and {len(captions)} captions.")
    margin, size = cell // 10, max(11, cell // 15)
    font = ImageFont.load_default(size)
    leading = size * 4 // 3
    pictures = [fit(image, cell) for image in images]
    lines = [wrap(caption, font, cell) for caption in captions]

    rows = [range(i, min(i + columns, len(images))) for i in range(0, len(images), columns)]
    picture_heights = [max(pictures[i].height for i in row) for row in rows]
    row_heights = [
        height + size // 2 + leading * max(len(lines[i]) for i in row) + margin
        for row, height in zip(rows, picture_heights, strict=True)
    ]
    sheet = Image.new("RGB", (margin + len(rows[0]) * (cell + margin), margin + sum(row_heights)), PAPER)
    draw = ImageDraw.Draw(sheet)
    top = margin
    for row, picture_height, row_height in zip(rows, picture_heights, row_heights, strict=True):
        for column, i in enumerate(row):
            left = margin + column * (cell + margin)
            sheet.paste(pictures[i], (left, top))
            for number, line in enumerate(lines[i]):
                where = (left + cell / 2, top + picture_height + size // 2 + number * leading)
                draw.text(where, line, fill=INK, font=font, anchor="ma")  # anchored at its top, in the middle
        top += row_height
    return sheet


def fit(image: Pixels | Image.Image, width: int) -> Image.Image:
    picture = (image if isinstance(image, Image.Image) else Image.fromarray(image)).convert("RGB")
    if picture.width == width:
        return picture
    return picture.resize((width, round(picture.height * width / picture.width)), Image.Resampling.LANCZOS)


def wrap(caption: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Lines no wider than `width`; a single word that is wider is cut with an ellipsis."""
    lines: list[str] = []
    for word in caption.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] = f"{lines[-1]} {word}"
            continue
        while len(word) > 1 and font.getlength(word) > width:
            word = word.rstrip("…")[:-1] + "…"
        lines.append(word)
    return lines
