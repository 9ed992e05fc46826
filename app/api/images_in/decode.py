"""Decodes a checked image file to pixels: upright, in sRGB, without alpha, scaled to the size that a model takes.

Of an animation, the first frame. The caller runs this in a thread, and bounds how many files are decoded at once.
"""

from io import BytesIO

import numpy as np
from PIL import Image, ImageCms

from app.api.images_in.headers import BadImage, Header
from app.api.images_in.png_rows import has_all_rows
from app.types import Mask, Pixels, Size

PAPER = (255, 255, 255)  # what shows through transparent pixels
OPAQUE = 128  # of 255: alpha below it counts as transparent
PROFILE_BYTES = 4 << 20  # a longer profile is ignored; those of printers have about two million
TO_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def pixels_of(header: Header, size: Size) -> Pixels:
    """The picture, scaled until it covers `size` and cropped to its middle. Raises BadImage."""
    image, profile = opened(header, size)
    image = resized(image, header, size, Image.Resampling.LANCZOS)
    return np.asarray(upright(flattened(image, profile), header))


def mask_of(header: Header, size: Size) -> Mask:
    """True where the picture is transparent, scaled as `pixels_of` does. Raises BadImage."""
    image, _ = opened(header, size)
    if "A" not in image.getbands():
        raise BadImage("must have an alpha channel: what is transparent in it is redrawn")
    alpha = resized(image.getchannel("A"), header, size, Image.Resampling.BOX)
    mask = np.asarray(upright(alpha, header)) < OPAQUE
    if not mask.any():
        raise BadImage("must have transparent pixels: what is transparent in it is redrawn")
    return mask


def opened(header: Header, size: Size) -> tuple[Image.Image, bytes | None]:
    """The picture as it is stored, as one of L, LA, RGB, RGBA and CMYK, and its colour profile."""
    try:
        image = Image.open(BytesIO(header.picture), formats=[header.format])
        if image.size != header.stored:
            raise BadImage("is no valid image: its size differs from that in its header")
        if header.format == "JPEG":  # which can be decoded at a half, a quarter or an eighth of its size
            largest = 2 * max(size)
            image.draft(image.mode, (largest, largest))
        if header.format == "PNG" and not has_all_rows(header.picture[16:29], header.rows):
            raise BadImage("is truncated or corrupt: it has fewer rows than its header says")
        image.load()
        return in_eight_bits(image), image.info.get("icc_profile")
    except (BadImage, MemoryError):
        raise
    except Exception as error:  # for broken files, Pillow's decoders raise errors of a dozen classes
        what = "is truncated" if "truncated" in str(error) else "is corrupt"
        raise BadImage(f"{what}: its picture cannot be decoded") from None


def in_eight_bits(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # Pillow would clip 16 bits instead of dividing them
        levels = np.asarray(image).astype(np.uint16)
        gray = Image.fromarray((levels >> 8).astype(np.uint8))
        if (transparent := image.info.get("transparency")) is not None:
            gray.putalpha(Image.fromarray(np.where(levels == transparent, 0, 255).astype(np.uint8)))
        return gray
    if image.has_transparency_data and image.mode not in ("LA", "RGBA"):
        return image.convert("RGBA")
    return image if image.mode in ("L", "LA", "RGB", "RGBA", "CMYK") else image.convert("RGB")


def resized(image: Image.Image, header: Header, size: Size, filter: Image.Resampling) -> Image.Image:
    """`size` is of the upright picture. The window is in the middle, so it is the same after turning."""
    width, height = reversed(size) if header.orientation >= 5 else size
    scale = max(width / image.width, height / image.height)
    left, top = (image.width - width / scale) / 2, (image.height - height / scale) / 2
    box = (max(left, 0.0), max(top, 0.0), min(image.width - left, image.width), min(image.height - top, image.height))
    return image.resize((width, height), filter, box, reducing_gap=3.0)


def flattened(image: Image.Image, profile: bytes | None) -> Image.Image:
    """In sRGB, with paper behind transparent pixels."""
    alpha = image.getchannel("A") if "A" in image.getbands() else None
    colours = in_srgb(image.convert("L" if image.mode == "LA" else "RGB") if alpha else image, profile)
    if alpha is None:
        return colours
    sheet = Image.new("RGB", colours.size, PAPER)
    sheet.paste(colours, mask=alpha)
    return sheet


def in_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Without a profile, or with one that does not fit, colours count as sRGB already, as in browsers."""
    if profile and len(profile) <= PROFILE_BYTES:
        try:
            source = ImageCms.ImageCmsProfile(BytesIO(profile))
            converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
        except (ImageCms.PyCMSError, OSError, ValueError):
            pass
        else:
            assert converted is not None
            return converted
    return image.convert("RGB")


def upright(image: Image.Image, header: Header) -> Image.Image:
    turn = TO_UPRIGHT.get(header.orientation)
    return image if turn is None else image.transpose(turn)
