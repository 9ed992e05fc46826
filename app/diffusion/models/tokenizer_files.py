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
SPARE = 0.05  # the share of rows without a token that a text encoder may have
VOCAB, MERGES = "vocab.json", "merges.txt"
FILES = (VOCAB, "tokenizer.json", "added_tokens.json", "tokenizer_config.json", "special_tokens_map.json")
ALL_FILES = (*FILES, MERGES, "chat_template.jinja")  # of which a tokenizer has some
SIDES = ("padding_side", "truncation_side")
Files = Mapping[str, dict[str, Any]]  # the content of each of FILES, {} where it is missing
ENDS = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"}
SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


def tokenizer_problems(folder: Path, text: Any, where: str, *, fixed_length: bool) -> list[str]:
    """A sentence for each thing that is wrong with the files in `folder`, for a text encoder's architecture.

    Problems call the folder `where`. `fixed_length`: its texts have as many tokens as the text encoder has positions.
    """
    problems: list[str] = []
    files = {name: read_json(folder / name, f"{where}/{name}", problems, optional=True) for name in FILES}
    merges = read_text(folder / MERGES, f"{where}/{MERGES}", problems, optional=True)
    if problems:
        return problems
    ids = declared_ids(folder, files, where, problems)
    if not problems:
        problems += beyond(ids, text.vocab_size, where)
        problems += without_token(ids, text.vocab_size, where)
        problems += unmade(files, merges, where)
    config = files["tokenizer_config.json"]
    length = config.get("model_max_length")
    limited = fixed_length and isinstance(length, int | float) and length < UNLIMITED
    if limited and length != text.max_position_embeddings:
        problems.append(
            f"{where}/tokenizer_config.json: model_max_length must be the text encoder's max_position_embeddings "
            f"{text.max_position_embeddings}, got {length}."
        )
    for name in SIDES:
        if config.get(name, "right") != "right":
            problems.append(f"{where}/tokenizer_config.json: {name} must be right, got {config[name]!r}.")
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        for name in SPECIAL:
            token = content_of(files[file].get(name))
            if ids and token is not None and token not in ids:
                problems.append(f"{where}/{file}: {name} {token!r} is no token of the vocabulary.")
            elif ENDS["bos_token"] in ids and token is not None and token != ENDS.get(name, token):
                problems.append(f"{where}/{file}: {name} must be {ENDS[name]!r}, as CLIP was trained, got {token!r}.")
    return problems


def beyond(ids: Mapping[str, int], rows: int, where: str = "tokenizer") -> Iterator[str]:
    """A sentence for tokens whose id is no row of the text encoder."""
    wrong = [f"{token!r} has the id {id}" for token, id in ids.items() if not 0 <= id < rows]
    if wrong:
        yield f"{where}: {some(wrong)}, and the text encoder has {rows} rows, 0 to {rows - 1}."


def without_token(ids: Mapping[str, int], rows: int, where: str) -> Iterator[str]:
    """A sentence where many rows have no token: then the vocabulary is another model's. A few may be spare."""
    if (spare := rows - len(set(ids.values()))) > SPARE * rows:
        yield f"{where}: no token has the id of {spare} of the text encoder's {rows} rows: it is another model's."


def some(items: list[str]) -> str:
    more = len(items) - NAMED
    return ", ".join(items[:NAMED]) + (f" and {more} more" if more > 0 else "")


def declared_ids(folder: Path, files: Files, where: str, problems: list[str]) -> dict[str, int]:
    """The id of every token, from all files that declare tokens."""
    whole = files["tokenizer.json"]
    absent = [f"{where}/{name}" for name in (VOCAB, MERGES) if not (folder / name).is_file()]
    if not whole and absent:
        verb = "is" if len(absent) == 1 else "are"
        problems.append(f"{' and '.join(absent)} {verb} missing, and there is no tokenizer.json.")
        return {}
    model, added = whole.get("model"), whole.get("added_tokens")
    decoder = files["tokenizer_config.json"].get("added_tokens_decoder")
    sources: list[tuple[str, Any]] = [
        (VOCAB, files[VOCAB]),
        ("tokenizer.json", model.get("vocab") if isinstance(model, dict) else {}),
        ("tokenizer.json", {content_of(token): token.get("id") for token in listed(added) if isinstance(token, dict)}),
        ("added_tokens.json", files["added_tokens.json"]),
        ("tokenizer_config.json", {content_of(token): number(id) for id, token in mapped(decoder).items()}),
    ]
    ids: dict[str, int] = {}
    for file, tokens in sources:
        for token, id in mapped(tokens).items():
            if type(id) is not int:
                problems.append(f"{where}/{file}: the id of {token!r} must be a whole number, got {id!r}.")
                return {}
            if ids.setdefault(str(token), id) != id:
                problems.append(f"{where}/{file}: {token!r} has the id {id}, and {ids[str(token)]} elsewhere.")
                return {}
    return ids


def listed(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def mapped(value: object) -> dict[Any, Any]:
    return value if isinstance(value, dict) else {}


def number(text: str) -> int | str:
    return int(text) if text.isascii() and text.isdigit() else text


def unmade(files: Files, merges: str | None, where: str) -> Iterator[str]:
    """A sentence where words of vocab.json are made by no line of merges.txt, as where that file is cut short."""
    if not files[VOCAB] or merges is None:
        return
    made = {line.rstrip("\r").replace(" ", "") for line in merges.split("\n") if not line.startswith("#version")}
    special = files["added_tokens.json"].keys() | set(ENDS.values())
    words = [word for word in files[VOCAB] if len(word.removesuffix("</w>")) > 1 and word not in special]
    missing = [word for word in words if word not in made]
    if len(missing) > UNREACHABLE * len(words):
        yield (
            f"{where}/{MERGES} has no line that makes {len(missing)} of the {len(words)} words in {VOCAB}, "
            f"such as {missing[-1]!r}: it seems cut short."
        )


def content_of(token: object) -> str | None:
    """A token is written as its text, or as an object that contains its text."""
    value = token.get("content") if isinstance(token, dict) else token
    return value if isinstance(value, str) else None
