"""app/api/api_keys.py: reading the file, finding a key, and its limits on a clock that the tests set."""

import hashlib
import hmac
import logging
import os
import queue
import re
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.api import api_keys
from app.api.api_keys import MOST_BYTES, ApiKey, ApiKeys, LimitReached, content_of, digest_of, new_key, parse


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def entry(name: str, key: str = "", **limits: Any) -> dict[str, Any]:
    return {"name": name, "sha256": digest_of((key or name).encode()), **limits}


def write(path: Path, *entries: Any) -> Path:
    """Replaces the file, as an editor or `make api-key` does."""
    draft = path.with_suffix(".draft")
    draft.write_text(yaml.safe_dump([*entries], explicit_end=True))
    draft.chmod(0o600)
    draft.replace(path)
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "keys.yaml", entry("alice", "key of alice"), entry("bob", "key of bob"))


def name_of(keys: ApiKeys, key: str) -> str | None:
    match = keys.find(key.encode())
    return match.entry.name if match else None


# The file


def test_a_key_is_a_prefix_and_256_random_bits_and_the_file_has_its_sha256() -> None:
    key = new_key()
    assert key.startswith("imagine-") and len(key) == len("imagine-") + 43 and key != new_key()
    assert digest_of(key.encode()) == hashlib.sha256(key.encode()).hexdigest()


def test_a_key_is_found_by_its_hash(file: Path) -> None:
    known = ApiKeys(file)
    names = [name_of(known, key) for key in ("key of alice", "key of bob", "key of eve", "")]
    assert names == ["alice", "bob", None, None]
    assert name_of(known, digest_of(b"key of alice")) is None, "who reads the file has no key"


def test_every_entry_is_compared_whichever_matches(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[str] = []
    in_constant_time = hmac.compare_digest

    def compare(known: str, digest: str) -> bool:
        compared.append(known)
        return in_constant_time(known, digest)

    monkeypatch.setattr(hmac, "compare_digest", compare)
    known = ApiKeys(file)
    for key in ("key of alice", "key of bob", "key of eve"):
        compared.clear()
        known.find(key.encode())
        assert compared == [digest_of(b"key of alice"), digest_of(b"key of bob")]


HASH = "a" * 64
LEAK = "imagine-0123456789012345678901234567890123456789012"
BAD: list[tuple[str, str]] = [
    ("[", "keys.yaml is not YAML, line 1."),
    ("\x00", "keys.yaml is not YAML."),
    ("when: 2020-99-99", "keys.yaml is not YAML."),
    ("[" * 5000, "keys.yaml is not YAML."),
    ("a: 3", "keys.yaml must be a list of keys, each with a name and a sha256; without keys, []."),
    ("- alice", "keys.yaml, entry 1 must be a mapping of name, sha256, requests_per_minute and concurrent_requests."),
    (
        f"- {{name: a, sha256: {HASH}, rpm: 3}}",
        "keys.yaml, entry 1 (a): rpm is not known here; an entry has name, sha256, requests_per_minute and "
        "concurrent_requests.",
    ),
    ("- {name: a}", "keys.yaml, entry 1 (a): sha256 is missing; it must be 64 hexadecimal digits in lower case."),
    (f"- {{name: a, sha256: {LEAK}}}", "keys.yaml, entry 1 (a): sha256 must be 64 hexadecimal digits in lower case."),
    (f"- {{name: a, sha256: {'A' * 64}}}", "entry 1 (a): sha256 must be 64 hexadecimal digits in lower case."),
    (f'- {{name: a, sha256: "{HASH}\\n"}}', "entry 1 (a): sha256 must be 64 hexadecimal digits in lower case."),
    (f"- {{name: a, sha256: {HASH}}}\n- {{name: b c, sha256: {HASH}}}", "keys.yaml, entry 2: name must be 1 to 64"),
    (f"- {{name: 7, sha256: {HASH}}}", "keys.yaml, entry 1: name must be 1 to 64 letters, digits, dots, dashes"),
    (
        f"- {{name: a, sha256: {HASH}, requests_per_minute: 0}}",
        "entry 1 (a): requests_per_minute must be an integer of at least 1.",
    ),
    (
        f"- {{name: a, sha256: {HASH}, concurrent_requests: '3'}}",
        "entry 1 (a): concurrent_requests must be an integer of at least 1.",
    ),
    (
        f"- {{name: a, sha256: {HASH}}}\n- {{name: a, sha256: {'b' * 64}}}",
        "keys.yaml, entry 2 (a): another entry has the same name.",
    ),
    (
        f"- {{name: a, sha256: {HASH}}}\n- {{name: b, sha256: {HASH}}}",
        "keys.yaml, entry 2 (b): another entry has the same sha256.",
    ),
]


@pytest.mark.parametrize(("text", "sentence"), BAD, ids=[case[1][:70] for case in BAD])
def test_an_error_in_the_file_names_the_entry_and_shows_no_key(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
        ApiKeys(path)
    message = str(caught.value)
    assert sentence in message and str(path) in message and "\n" not in message and LEAK not in message


def test_a_missing_file_or_one_that_is_not_text_is_an_error_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere.yaml cannot be read: No such file or directory\.$"):
        ApiKeys(tmp_path / "nowhere.yaml")
    (tmp_path / "keys.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is not YAML"):
        ApiKeys(tmp_path / "keys.yaml")


@pytest.mark.parametrize(("mode", "refused"), [(0o600, False), (0o644, False), (0o664, False), (0o646, True)])
def test_a_world_writable_file_is_refused(file: Path, mode: int, refused: bool) -> None:
    file.chmod(mode)
    if refused:
        with pytest.raises(ValueError, match="must not be writable by everyone: chmod o-w"):
            ApiKeys(file)
    else:
        assert name_of(ApiKeys(file), "key of bob") == "bob"


@pytest.mark.parametrize("text", ["", "\n", "# none left\n", "...\n", "---\n"])
def test_an_empty_file_is_refused_and_an_empty_list_has_no_keys(tmp_path: Path, text: str) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        ApiKeys(path)
    path.write_text(f"# none left\n[]\n{text.replace('---', '...')}")
    assert name_of(ApiKeys(path), "") is None


LIST = yaml.safe_dump([entry("alice"), entry("bob", requests_per_minute=60)], explicit_end=True, sort_keys=False)


@pytest.mark.parametrize(
    "text",
    [
        LIST,
        "# ours\n" + LIST + "# the end\n",
        LIST.removesuffix("\n"),
        yaml.safe_dump([entry("alice"), entry("bob", requests_per_minute=60)], default_flow_style=True),
    ],
    ids=["a list", "with comments", "without the last line's end", "in brackets"],
)
def test_a_truncated_file_is_refused(text: str) -> None:
    whole = parse(text.encode(), "keys.yaml")
    assert [key.name for key in whole] == ["alice", "bob"]
    content = text.rstrip().removesuffix("# the end").rstrip()
    for length in range(len(content)):
        with pytest.raises(ValueError, match="^keys.yaml"):
            parse(text[:length].encode(), "keys.yaml")
    assert all(parse(text[:length].encode(), "keys.yaml") == whole for length in range(len(content), len(text)))


def test_the_error_for_a_file_truncated_between_two_entries_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^keys.yaml must end with a line \.\.\. below the last key: without it"):
        parse(LIST[: LIST.index("- name: bob")].encode(), "keys.yaml")
    for start in ("", "---\n"):
        with pytest.raises(ValueError, match=r"^keys.yaml, line \d+: nothing may stand below a line \.\.\.;"):
            parse((LIST + start + yaml.safe_dump([entry("eve")], explicit_end=True)).encode(), "keys.yaml")


@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "socket", "huge"])
def test_a_device_pipe_or_huge_file_is_refused_without_waiting(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "keys.yaml"
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "folder":
            path.mkdir()
        case "socket":
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(str(path))
        case "huge":
            path.write_text(LIST)
            os.truncate(path, MOST_BYTES + 1)
    rule = f"at most {MOST_BYTES} bytes, and has {MOST_BYTES + 1}" if kind == "huge" else "a regular file"
    with pytest.raises(ValueError, match=f"keys.yaml must be {rule}"):
        ApiKeys(path)


def test_a_pipe_that_replaces_the_file_is_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pipe replaces it between stat() and open(), which waits for a writer."""
    status = file.stat()
    file.unlink()
    os.mkfifo(file)
    monkeypatch.setattr(Path, "stat", lambda path: status)
    with pytest.raises(ValueError, match="must be a regular file"):
        content_of(file)


# The file changes


def test_a_key_is_added_and_revoked_by_a_change_of_the_file(file: Path) -> None:
    known = ApiKeys(file)
    write(file, entry("bob", "key of bob"), entry("eve", "key of eve"))
    known.refresh()
    assert [name_of(known, f"key of {name}") for name in ("alice", "bob", "eve")] == [None, "bob", "eve"]
    file.write_text("[]\n")
    known.refresh()
    assert name_of(known, "key of bob") is None


def test_finding_a_key_reads_no_disk_and_a_thread_reads_changes(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readers: queue.Queue[threading.Thread] = queue.Queue()

    class Watched(ApiKeys):
        def read(self) -> str | None:
            readers.put(threading.current_thread())
            return super().read()

    monkeypatch.setattr(api_keys, "REFRESH_S", 0.01)
    known = Watched(file)
    assert readers.get() is threading.current_thread()
    assert name_of(known, "key of alice") == "alice" and readers.empty()
    known.start_refreshing()
    reader = readers.get(timeout=120)
    assert reader is not threading.current_thread()
    write(file, entry("bob", "key of bob"))
    for _ in range(2):  # the first may have begun before
        readers.get(timeout=120)
    readers.get(timeout=120)
    assert [name_of(known, f"key of {name}") for name in ("alice", "bob")] == [None, "bob"]
    del known
    reader.join(60)
    assert not reader.is_alive(), "it ends with the keys that it reads"


def test_an_unchanged_file_is_not_read_again(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = ApiKeys(file)
    monkeypatch.setattr(api_keys, "content_of", lambda path: pytest.fail("it was read again"))
    known.refresh()
    assert name_of(known, "key of alice") == "alice"


def broken(file: Path) -> None:
    file.write_text("- {name: alice, sha256: short}")


def cut_to_nothing(file: Path) -> None:
    os.truncate(file, 0)


def cut_between_two_entries(file: Path) -> None:
    os.truncate(file, file.read_text().index("- name: bob"))


def a_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def huge(file: Path) -> None:
    os.truncate(file, 1 << 40)


def gone(file: Path) -> None:
    file.unlink()


def open_to_all(file: Path) -> None:
    file.chmod(0o666)


@pytest.mark.parametrize(
    "spoil", [broken, gone, open_to_all, cut_to_nothing, cut_between_two_entries, a_pipe, a_folder, huge]
)
def test_a_file_that_becomes_invalid_keeps_the_last_keys_and_is_logged_once(
    file: Path, caplog: pytest.LogCaptureFixture, spoil: Any
) -> None:
    known = ApiKeys(file)
    spoil(file)
    for _ in range(3):
        known.refresh()
        assert [name_of(known, f"key of {name}") for name in ("alice", "bob", "eve")] == ["alice", "bob", None]
    (error,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert str(file) in error.message and error.message.endswith("The keys that were read before stay in force.")
    if file.is_dir():
        file.rmdir()
    write(file, entry("eve", "key of eve"))
    known.refresh()
    assert [name_of(known, f"key of {name}") for name in ("alice", "eve")] == [None, "eve"], "once it is good again"


def test_a_failed_read_is_repeated(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = ApiKeys(file)
    write(file, entry("bob", "key of bob"))

    def no_more_files(path: Path) -> bytes:
        raise OSError(24, os.strerror(24))

    with monkeypatch.context() as patched:
        patched.setattr(api_keys, "content_of", no_more_files)
        known.refresh()
        assert name_of(known, "key of alice") == "alice"
    known.refresh()
    assert name_of(known, "key of alice") is None, "revoked as soon as the file can be read"


# Limits


def key_with(clock: Clock, **limits: int) -> ApiKey:
    (parsed,) = parse(yaml.safe_dump([entry("alice", "", **limits)], explicit_end=True).encode(), "")
    return ApiKey(parsed, clock)


def served(key: ApiKey, images: int = 1) -> bool:
    try:
        key.begin()
    except LimitReached:
        return False
    key.spend(images - 1)
    key.end()
    return True


def test_a_minutes_requests_may_come_at_once_and_refill_evenly() -> None:
    clock = Clock()
    key = key_with(clock, requests_per_minute=4)
    assert [served(key) for _ in range(5)] == [True] * 4 + [False]
    with pytest.raises(LimitReached, match="allows 4 a minute") as caught:
        key.begin()
    assert caught.value.retry_after_s == 15
    clock.now += 14.9
    assert not served(key)
    clock.now += 0.1
    assert served(key) and not served(key)
    clock.now += 3600
    assert [served(key) for _ in range(5)] == [True] * 4 + [False], "no more than a minute's are saved up"


def test_a_request_for_n_images_counts_as_n_and_is_always_possible() -> None:
    clock = Clock()
    key = key_with(clock, requests_per_minute=2)
    assert served(key, images=4)
    with pytest.raises(LimitReached) as caught:
        key.begin()
    assert caught.value.retry_after_s == 90, "two beyond the minute, and one to go on with"
    clock.now += 90
    assert served(key, images=4), "the mean is two a minute"


def test_concurrent_requests_are_limited_and_a_refused_one_does_not_count() -> None:
    key = key_with(Clock(), concurrent_requests=2)
    key.begin()
    key.begin()
    for _ in range(3):
        with pytest.raises(LimitReached, match="allows 2 at a time") as caught:
            key.begin()
        assert caught.value.retry_after_s > 0
    key.end()
    key.begin()
    with pytest.raises(LimitReached):
        key.begin()


def test_a_request_that_one_limit_refuses_uses_nothing_of_the_other() -> None:
    clock = Clock()
    key = key_with(clock, concurrent_requests=1, requests_per_minute=2)
    key.begin()
    for _ in range(3):
        assert not served(key)
    key.end()
    assert served(key) and not served(key) and key.running == 0


def test_a_key_without_limits_is_unlimited() -> None:
    key = key_with(Clock())
    for _ in range(1000):
        key.begin()
    assert key.running == 1000


def test_the_use_of_a_limit_survives_a_change_of_the_file(tmp_path: Path) -> None:
    clock = Clock()
    path = write(tmp_path / "keys.yaml", entry("alice", requests_per_minute=2, concurrent_requests=1))
    known = ApiKeys(path, clock)
    alice = known.find(b"alice")
    assert alice
    alice.begin()
    write(path, entry("bob"), entry("alice", requests_per_minute=1, concurrent_requests=2))
    known.refresh()
    again = known.find(b"alice")
    assert again is alice and again.running == 1
    again.begin()  # the second place that the file gives now
    again.end()
    assert not served(again), "both of the minute's are used"
    write(path, entry("alice"))
    known.refresh()
    assert known.find(b"alice") is alice and all(served(alice) for _ in range(9))
    write(path, entry("alice", requests_per_minute=3))
    known.refresh()
    assert known.find(b"alice") is alice and [served(alice) for _ in range(4)] == [True] * 3 + [False]
