"""What a tokenizer's files declare, held to the text encoder that reads its ids. Needs neither transformers nor JAX.

A tokenizer whose files are missing or cut short still loads in transformers: it then gives every prompt the same ids,
or spells each word letter by letter. And an id that the text encoder has no row for draws a black picture.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from app.diffusion.models.small_files import read_json, read_text

UNLIMITED = 10**29  # transformers writes 10^30 for a model_max_length that nobody set
NAMED = 5  # tokens that one problem names
UNREACHABLE = 0.01  # the share of words that no merge makes from which a list of merges counts as cut short
SIDES = ("padding_side", "truncation_side")
SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


def tokenizer_problems(folder: Path, text: Any, *, fixed_length: bool) -> list[str]:
    """A sentence for each thing that is wrong with the files in `folder`, for a text encoder's architecture.

    `fixed_length`: its texts have as many tokens as the text encoder has positions.
    """
    problems: list[str] = []
    ids = declared_ids(folder, problems)
    if not problems:
        problems += beyond(ids, text.vocab_size)
        problems += unmade(folder, ids)
    config = read(folder, "tokenizer_config.json", problems)
    length = config.get("model_max_length")
    limited = fixed_length and isinstance(length, int | float) and length < UNLIMITED
    if limited and length != text.max_position_embeddings:
        problems.append(
            f"tokenizer/tokenizer_config.json: model_max_length must be the text encoder's max_position_embeddings "
            f"{text.max_position_embeddings}, got {length}."
        )
    for name in SIDES:
        if config.get(name, "right") != "right":
            problems.append(f"tokenizer/tokenizer_config.json: {name} must be right, got {config[name]!r}.")
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        content = read(folder, file, problems)
        for name in SPECIAL:
            token = content_of(content.get(name))
            if ids and token is not None and token not in ids:
                problems.append(f"tokenizer/{file}: {name} {token!r} is no token of the vocabulary.")
    return problems


def beyond(ids: Mapping[str, int], rows: int) -> Iterator[str]:
    """A sentence for tokens whose id is no row of the text encoder."""
    wrong = [f"{token!r} has the id {id}" for token, id in ids.items() if not 0 <= id < rows]
    if wrong:
        yield f"tokenizer: {some(wrong)}, and the text encoder has {rows} rows, 0 to {rows - 1}."


def some(items: list[str]) -> str:
    more = len(items) - NAMED
    return ", ".join(items[:NAMED]) + (f" and {more} more" if more > 0 else "")


def declared_ids(folder: Path, problems: list[str]) -> dict[str, int]:
    """The id of every token, from all files that declare tokens."""
    whole = read(folder, "tokenizer.json", problems)
    parts = [name for name in ("vocab.json", "merges.txt") if not (folder / name).is_file()]
    if not whole and parts:
        names = " and ".join(f"tokenizer/{name}" for name in parts)
        problems.append(f"{names} {'is' if len(parts) == 1 else 'are'} missing, and there is no tokenizer.json.")
        return {}
    model, added = whole.get("model"), whole.get("added_tokens")
    decoder = read(folder, "tokenizer_config.json", []).get("added_tokens_decoder")
    sources: list[tuple[str, Any]] = [
        ("vocab.json", read(folder, "vocab.json", problems)),
        ("tokenizer.json", model.get("vocab") if isinstance(model, dict) else {}),
        ("tokenizer.json", {content_of(token): token.get("id") for token in listed(added) if isinstance(token, dict)}),
        ("added_tokens.json", read(folder, "added_tokens.json", problems)),
        ("tokenizer_config.json", {content_of(token): number(id) for id, token in mapped(decoder).items()}),
    ]
    ids: dict[str, int] = {}
    for file, tokens in sources:
        for token, id in mapped(tokens).items():
            if type(id) is not int:
                problems.append(f"tokenizer/{file}: the id of {token!r} must be a whole number, got {id!r}.")
                return {}
            if ids.setdefault(str(token), id) != id:
                problems.append(f"tokenizer/{file}: {token!r} has the id {id}, and {ids[str(token)]} elsewhere.")
                return {}
    return ids


def listed(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def mapped(value: object) -> dict[Any, Any]:
    return value if isinstance(value, dict) else {}


def number(text: str) -> int | str:
    return int(text) if text.isascii() and text.isdigit() else text


def unmade(folder: Path, ids: Mapping[str, int]) -> Iterator[str]:
    """A sentence where words of vocab.json are made by no line of merges.txt, as where that file is cut short."""
    if not (folder / "vocab.json").is_file() or not (folder / "merges.txt").is_file():
        return
    unreadable: list[str] = []
    text = read_text(folder / "merges.txt", "tokenizer/merges.txt", unreadable)
    if text is None:
        yield from unreadable
        return
    lines = text.split("\n")
    made = {line.rstrip("\r").replace(" ", "") for line in lines if not line.startswith("#version")}
    special = read(folder, "added_tokens.json", []).keys() | {"<|startoftext|>", "<|endoftext|>"}
    words = [word for word in read(folder, "vocab.json", []) if len(word.removesuffix("</w>")) > 1]
    words = [word for word in words if word not in special]
    missing = [word for word in words if word not in made]
    if len(missing) > UNREACHABLE * len(words):
        yield (
            f"tokenizer/merges.txt has no line that makes {len(missing)} of the {len(words)} words in vocab.json, "
            f"such as {missing[-1]!r}: it seems cut short."
        )


def content_of(token: object) -> str | None:
    """A token is written as its text, or as an object that contains its text."""
    value = token.get("content") if isinstance(token, dict) else token
    return value if isinstance(value, str) else None


def read(folder: Path, name: str, problems: list[str]) -> dict[str, Any]:
    """Empty where there is no such file. `declared_ids` says which files must be there."""
    return read_json(folder / name, f"tokenizer/{name}", problems, optional=True)
