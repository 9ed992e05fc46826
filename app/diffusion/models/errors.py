"""What another library's exception says, on one line. Knows nothing of models."""

LONGEST = 400  # characters


def one_line(error: BaseException) -> str:
    """All of it: the first line of what the Hugging Face Hub's client raises says "404 Client Error." and no more."""
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= LONGEST else f"{words[: LONGEST - 3]}..."
