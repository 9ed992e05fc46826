"""What another library's exception says, on one line. Knows nothing of models."""

LONGEST = 400  # characters


def one_line(error: BaseException) -> str:
    """All lines joined: the first line of an error of the Hugging Face Hub's client is only "404 Client Error."."""
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= LONGEST else f"{words[: LONGEST - 3]}..."
