"""The colours of things, and the palette that each thing is painted with. Knows nothing of shapes."""

from functools import cache

Rgb = tuple[int, int, int]

COLOURS: dict[str, Rgb] = {
    "red": (222, 40, 48),
    "orange": (252, 138, 16),
    "yellow": (255, 216, 40),
    "green": (46, 164, 70),
    "teal": (24, 196, 196),
    "blue": (40, 106, 232),
    "purple": (138, 64, 200),
    "pink": (252, 132, 190),
}
# What each colour deepens towards, for shade and outline; mixing with grey would turn yellow to olive.
DEEP: dict[str, Rgb] = {
    "red": (104, 0, 40),
    "orange": (150, 48, 0),
    "yellow": (168, 96, 0),
    "green": (0, 64, 60),
    "teal": (0, 74, 110),
    "blue": (16, 16, 112),
    "purple": (46, 8, 96),
    "pink": (176, 24, 104),
}
CREAM: Rgb = (255, 244, 220)
DARK: Rgb = (44, 38, 52)
TYRE: Rgb = (72, 66, 82)
BROWN: Rgb = (140, 92, 60)
LEAF: Rgb = (104, 158, 84)


@cache
def palette(colour: str) -> dict[str, Rgb]:
    main = COLOURS[colour]
    return {
        "main": main,
        "shade": mix(main, DEEP[colour], 0.32),
        "light": mix(main, (255, 255, 255), 0.55),
        "outline": mix(DEEP[colour], DARK, 0.4),
        "string": (140, 132, 140),
        "cream": CREAM,
        "dark": DARK,
        "tyre": TYRE,
        "brown": BROWN,
        "leaf": LEAF,
    }


def mix(start: Rgb, end: Rgb, share: float) -> Rgb:
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(start, end, strict=True))
    return red, green, blue
