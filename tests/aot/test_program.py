"""Compiled programs: what is loaded is what was compiled, what does not fit is compiled again, and the log says why."""

import errno
import logging
import os
import pickle
import re
import stat
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from app.aot import cache_key, store
from app.aot import compile as aot_compile
from app.aot.cache_key import fingerprint
from app.aot.compile import CompileWatch, compiled
from app.aot.program import Program

FACTS = {"jaxlib": "0.10.2", "source app/diffusion/pipeline.py": "1234", "XLA_FLAGS": ""}


class State(NamedTuple):
    x: Any
    count: Any


def add_program(weight: float, state: State, n: jax.Array) -> tuple[State, dict[str, list[jax.Array]]]:
    x = jnp.sin(state.x) * weight + n.astype(jnp.float32)
    return State(x, state.count + n), {"half": [x.astype(jnp.bfloat16), state.count]}


def shape(*shape: int, dtype: Any = jnp.float32) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)


def add(name: str = "add rows 5", weight: float = 2.0, rows: int = 5, donate: tuple[int, ...] = ()) -> Program:
    state = State(shape(rows), shape(dtype=jnp.int32))
    return Program(name, partial(add_program, weight), (state, shape(dtype=jnp.int32)), donate)


def state(rows: int = 5) -> State:
    return State(jnp.arange(rows, dtype=jnp.float32), jnp.int32(3))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "kept" / "programs"


@pytest.fixture
def log_lines(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What was logged since the last look."""
    caplog.set_level(logging.INFO, aot_compile.logger.name)

    def log_lines() -> list[str]:
        lines = [record.getMessage() for record in caplog.records if record.name == aot_compile.logger.name]
        caplog.clear()
        return lines

    return log_lines


@pytest.fixture
def watch() -> Iterator[CompileWatch]:
    watch = CompileWatch()
    yield watch
    watch.close()


LogLines = Callable[[], list[str]]


def make(program: Program, folder: Path | None, facts: dict[str, str] = FACTS) -> Any:
    return compiled([program], folder=folder, fingerprint=facts)[program.name]


def equal(a: Any, b: Any) -> bool:
    assert str(jax.tree.structure(a)) == str(jax.tree.structure(b))
    return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


def test_a_saved_program_gives_the_same_results_and_compiles_nothing(
    folder: Path, watch: CompileWatch, log_lines: LogLines
) -> None:
    declared = [add(), add("add rows 3", rows=3)]
    args = {5: (state(5), np.int32(4)), 3: (state(3), np.int32(4))}
    first = compiled(declared, folder=folder, fingerprint=FACTS)
    assert [re.sub(r"[\d.]+ s", "# s", line) for line in sorted(log_lines())] == [
        "compiled add rows 3 in # s: none was saved",
        "compiled add rows 5 in # s: none was saved",
    ]
    watch.ready()
    second = compiled(declared, folder=folder, fingerprint=FACTS)
    assert [re.sub(r"[\d.]+ s", "# s", line) for line in sorted(log_lines())] == [
        "loaded add rows 3 in # s (compiling took # s)",
        "loaded add rows 5 in # s (compiling took # s)",
    ]
    for program, rows in zip(declared, (5, 3), strict=True):
        assert equal(first[program.name](*args[rows]), second[program.name](*args[rows]))
    assert watch.count == 0
    make(add(), None)
    assert watch.count == 1  # the watch does see what is compiled


def test_results_come_back_in_their_own_classes(folder: Path) -> None:
    make(add(), folder)
    after, rest = make(add(), folder)(state(), np.int32(4))
    assert isinstance(after, State) and int(after.count) == 7 and list(rest) == ["half"]
    assert rest["half"][0].dtype == jnp.bfloat16
    np.testing.assert_allclose(after.x, np.sin(np.arange(5)) * 2 + 4, rtol=1e-6)


def test_donated_arguments_of_a_loaded_program_are_consumed(folder: Path) -> None:
    for _ in ("compiled", "loaded"):
        donating, donated = make(add(donate=(0,)), folder), state()
        after, _ = donating(donated, np.int32(1))
        again, _ = donating(after, np.int32(1))
        assert donated.x.is_deleted() and after.x.is_deleted()
        assert int(again.count) == 5


def test_a_loaded_program_takes_what_a_compiled_one_takes(folder: Path) -> None:
    """Arrays of JAX or numpy, and ints for an int32; the rest is refused rather than compiled for."""
    for program in (make(add(), folder), make(add(), folder)):
        host = State(np.arange(5, dtype=np.float32), np.int32(3))
        for n in (4, np.int32(4), np.array(4, np.int32), jnp.int32(4)):
            assert int(program(host, n)[0].count) == 7
        for n in (4.0, True, np.float32(4), np.uint32(4)):
            with pytest.raises(TypeError, match="Argument types differ"):
                program(host, n)
    scale = Program("scale", lambda x: x * 2, (shape(),))
    for program in (make(scale, folder), make(scale, folder)):
        assert [float(program(x)) for x in (4.0, np.float32(4), np.float64(4))] == [8.0, 8.0, 8.0]
        with pytest.raises(TypeError, match="Argument types differ"):
            program(4)


def test_a_loaded_program_refuses_other_shapes(folder: Path) -> None:
    for program in (make(add(), folder), make(add(), folder)):
        for wrong in (State(np.zeros(4, np.float32), np.int32(3)), State(np.zeros(5, np.float16), np.int32(3))):
            with pytest.raises(TypeError, match="Argument types differ"):
                program(wrong, 4)


# What does not fit


def damaged(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def test_a_file_with_any_byte_changed_is_not_read(folder: Path) -> None:
    make(add(), folder)
    (path,) = folder.iterdir()
    content = path.read_bytes()
    assert store.read(path).header["key"]["program"] == "add rows 5"
    line = content.index(b"\n") + 1
    for at in [*range(0, line, 3), line - 1, *range(line, len(content), 97), len(content) - 1]:
        path.write_bytes(damaged(content, at))
        with pytest.raises(store.Unusable, match="damaged"):
            store.read(path)
    for length in (0, 1, line - 1, line, line + 1, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(store.Unusable, match="damaged"):
            store.read(path)


@pytest.mark.parametrize("spoil", [lambda x: damaged(x, 50), lambda x: x[:-1], lambda x: b"", lambda x: b"\x80" * 99])
def test_a_damaged_file_is_compiled_again_and_mended(
    folder: Path, log_lines: LogLines, spoil: Callable[[bytes], bytes]
) -> None:
    make(add(), folder)
    (path,) = folder.iterdir()
    path.write_bytes(spoil(path.read_bytes()))
    log_lines()
    assert int(make(add(), folder)(state(), np.int32(1))[0].count) == 4
    (line,) = log_lines()
    assert line.startswith("compiled add rows 5 in") and "damaged" in line and str(path) in line
    make(add(), folder)
    assert log_lines()[0].startswith("loaded")


@pytest.mark.parametrize(
    "program, facts, why",
    [
        (add(), FACTS | {"jaxlib": "0.10.3"}, "the saved one differs in jaxlib (0.10.2, here 0.10.3)"),
        (
            add(),
            FACTS | {"source app/diffusion/pipeline.py": "5678"},
            "the saved one differs in source app/diffusion/pipeline.py",
        ),
        (add(), FACTS | {"XLA_FLAGS": "--fast"}, "the saved one differs in XLA_FLAGS (, here --fast)"),
        (add(), FACTS | {"libtpu": "1"}, "the saved one differs in libtpu (None, here 1)"),
        (add(rows=4), FACTS, "the saved one differs in arguments"),
        (add(donate=(0,)), FACTS, "the saved one differs in donate"),
        (add(weight=3.0), FACTS, "the saved one differs in function"),
        (add("add"), FACTS, "none was saved"),
    ],
)
def test_what_changed_is_compiled_and_named(
    folder: Path, log_lines: LogLines, program: Program, facts: dict[str, str], why: str
) -> None:
    make(add(), folder)
    log_lines()
    make(program, folder, facts)
    (line,) = log_lines()
    assert line.startswith(f"compiled {program.name} in") and line.endswith(f" s: {why}")
    make(program, folder, facts)
    make(add(), folder)
    assert [line.split()[0] for line in log_lines()] == ["loaded", "loaded"]


def test_the_nearest_of_several_saved_ones_is_named(folder: Path, log_lines: LogLines) -> None:
    make(add(), folder, FACTS | {"jaxlib": "0.9.0", "flax": "0.11"})
    make(add(), folder)
    log_lines()
    make(add(), folder, FACTS | {"jaxlib": "0.10.3"})
    assert log_lines()[0].endswith("differs in jaxlib (0.10.2, here 0.10.3)")


def test_what_is_stale_is_named_from_its_first_line_and_the_latest_files_alone(
    folder: Path, log_lines: LogLines
) -> None:
    """The stale file is longer than any memory; and of a folder that is never pruned, not all files are looked at."""
    make(add(), folder)
    (path,) = folder.iterdir()
    os.truncate(path, 1 << 40)
    log_lines()
    make(add(), folder, FACTS | {"jaxlib": "0.10.3"})
    assert log_lines()[0].endswith("the saved one differs in jaxlib (0.10.2, here 0.10.3)")
    path.unlink()
    (recent,) = folder.iterdir()
    os.utime(recent, (0, 0))
    for number in range(aot_compile.EXPLAINED):
        (folder / f"{recent.name[: -len('.xla') - 32]}{number:032x}.xla").write_bytes(b"{}\n")
    make(add(), folder, FACTS | {"jaxlib": "0.10.4"})
    assert log_lines()[0].endswith("none was saved")


def test_a_gpus_fingerprint_has_the_versions_of_cudas_libraries() -> None:
    gpu: Any = SimpleNamespace(
        platform="gpu", device_kind="NVIDIA H100", client=SimpleNamespace(platform_version="cuda 13000")
    )
    facts = fingerprint([gpu])
    assert facts["platform"] == "gpu cuda 13000" and facts["device"] == "NVIDIA H100"
    assert {"jax-cuda13-plugin", "nvidia-cublas", "nvidia-cudnn-cu13"} <= facts.keys()
    assert "nvidia-cudnn-cu13" not in fingerprint()


def test_a_fingerprint_follows_versions_flags_options_and_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def changed(before: dict[str, str]) -> set[str]:
        after = fingerprint()
        return {name for name in before | after if before.get(name) != after.get(name)}

    before = fingerprint()
    assert changed(before) == set()
    assert before["jax"] == jax.__version__ and before["device"] == "cpu"
    assert {f"source app/diffusion/{name}.py" for name in ("pipeline", "samplers/table", "models/unet")} <= set(before)
    with monkeypatch.context() as patch:
        patch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
        patch.setattr(cache_key, "version", lambda package: "9")
        assert changed(before) == {"XLA_FLAGS", *cache_key.PACKAGES}
    with jax.default_matmul_precision("highest"):
        assert changed(before) == {"jax_default_matmul_precision"}
    source, new, unrelated = (tmp_path / f"app/{name}.py" for name in ("diffusion/pipeline", "new", "unrelated"))
    source.parent.mkdir(parents=True)
    monkeypatch.setattr(cache_key, "ROOT", tmp_path)
    for file in (source, new, unrelated):
        file.write_text("a = 1\n")
    before = fingerprint()
    assert [name for name in before if name.startswith("source")] == ["source app/diffusion/pipeline.py"]
    source.write_text("import app.new\n")
    assert changed(before) == {"source app/diffusion/pipeline.py", "source app/new.py"}
    before = fingerprint()
    new.write_text("a = 2\n")
    unrelated.write_text("a = 2\n")
    assert changed(before) == {"source app/new.py"}


def test_values_that_a_function_holds_are_part_of_its_key() -> None:
    def held(value: Any) -> Any:
        return cache_key.key_of(add(weight=value), FACTS, {})["function"]

    def inner(value: Any) -> Callable[..., Any]:
        return lambda state, n: (state.x * value, n)

    assert held(2.0) == held(2.0) != held(3.0)
    long, longer = np.zeros(5000), np.zeros(5000)
    longer[2500] = 1  # which its repr leaves out
    assert held(long) == held(np.zeros(5000)) != held(longer)
    assert held(inner(1)) == held(inner(1)) != held(inner(2))


# Whom to trust


def test_compiler_options_are_part_of_a_key() -> None:
    options = replace(add(), compiler_options={"xla_cpu_enable_fast_math": "false"})
    assert cache_key.key_of(options, FACTS, {}) != cache_key.key_of(add(), FACTS, {})


def test_a_folder_that_others_may_write_to_is_not_used(folder: Path, log_lines: LogLines) -> None:
    make(add(), folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in folder.iterdir())
    for mode in (0o770, 0o702):
        folder.chmod(mode)
        log_lines()
        assert int(make(add("new"), folder)(state(), np.int32(1))[0].count) == 4
        warning, line = log_lines()
        assert f"chmod go-w {folder}" in warning and f"mode {mode:o}" in warning
        assert re.fullmatch(r"compiled new in [\d.]+ s", line)
    assert len(list(folder.iterdir())) == 1
    folder.chmod(0o755)
    make(add(), folder)
    assert log_lines()[0].startswith("loaded")


def test_a_file_that_others_may_write_to_is_compiled_again_and_replaced(folder: Path, log_lines: LogLines) -> None:
    make(add(), folder)
    (path,) = folder.iterdir()
    path.chmod(0o620)
    log_lines()
    make(add(), folder)
    assert "may be written to by others (mode 620)" in log_lines()[0]
    assert path.stat().st_mode & 0o777 == 0o600
    make(add(), folder)
    assert log_lines()[0].startswith("loaded")


def test_only_this_users_files_and_roots_are_trusted(tmp_path: Path) -> None:
    def why(uid: int) -> str:
        return store.distrust(tmp_path, SimpleNamespace(st_uid=uid, st_mode=0o100600))  # type: ignore[arg-type]

    assert why(os.geteuid()) == why(0) == ""
    assert f"{tmp_path} belongs to user 54321, not to {os.geteuid()} or root" in why(54321)


class Evil:
    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trace),)


def forge(folder: Path, **changes: Any) -> None:
    """Another content under the right name, key and checksum."""
    (path,) = folder.iterdir()
    saved = store.read(path)
    header, payload = saved.header | {k: v for k, v in changes.items() if k != "payload"}, saved.payload
    payload = changes.get("payload", payload)
    sealed = header | {"sha256": store.checksum_of(header, payload)}
    path.write_bytes(store.line_of(sealed) + payload)


def test_an_envelope_may_name_only_what_a_program_needs(folder: Path, tmp_path: Path, log_lines: LogLines) -> None:
    evil, trace = pickle.dumps(Evil(tmp_path / "trace")), tmp_path / "trace"
    make(add(), folder)
    forge(folder, payload=zlib.compress(evil))
    log_lines()
    assert int(make(add(), folder)(state(), np.int32(1))[0].count) == 4
    assert "it asks for posix.mkdir" in log_lines()[0]
    assert not trace.exists()
    pickle.loads(evil)
    assert trace.exists()  # it would have


def test_results_name_no_class_but_named_tuples(folder: Path, log_lines: LogLines) -> None:
    for name in ("os:mkdir", "os:nothing", "nowhere:State", "builtins:str"):
        make(add(), folder)
        forge(folder, results={name: [0]})
        log_lines()
        assert int(make(add(), folder)(state(), np.int32(1))[0].count) == 4
        assert f"{name} is no named tuple here" in log_lines()[0]


def test_a_program_under_anothers_name_is_not_loaded(folder: Path, log_lines: LogLines) -> None:
    make(add(), folder)
    (path,) = folder.iterdir()
    make(add(weight=3.0), folder)
    (other,) = set(folder.iterdir()) - {path}
    os.replace(other, path)
    log_lines()
    after, _ = make(add(), folder)(state(), np.int32(0))
    assert "it is another program" in log_lines()[0]
    np.testing.assert_allclose(after.x, np.sin(np.arange(5)) * 2, rtol=1e-6)


# Folders


def test_nothing_is_kept_without_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_lines: LogLines) -> None:
    monkeypatch.chdir(tmp_path)
    assert int(make(add(), None)(state(), np.int32(1))[0].count) == 4
    (line,) = log_lines()
    assert re.fullmatch(r"compiled add rows 5 in [\d.]+ s", line)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_a_warning(tmp_path: Path, log_lines: LogLines) -> None:
    (tmp_path / "file").write_text("")
    assert int(make(add(), tmp_path / "file" / "programs")(state(), np.int32(1))[0].count) == 4
    warning, line = log_lines()
    assert "Not a directory" in warning and line.startswith("compiled add rows 5")


@pytest.mark.parametrize(
    "call, error", [("os.replace", errno.ENOSPC), ("tempfile.mkstemp", errno.EROFS), ("tempfile.mkstemp", errno.EACCES)]
)
def test_a_full_disk_or_a_read_only_one_is_a_warning(
    folder: Path, log_lines: LogLines, monkeypatch: pytest.MonkeyPatch, call: str, error: int
) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise OSError(error, os.strerror(error))

    with monkeypatch.context() as patch:
        patch.setattr(call, fail)
        assert int(make(add(), folder)(state(), np.int32(1))[0].count) == 4
    line, warning = log_lines()
    assert line.startswith("compiled") and os.strerror(error) in warning
    assert not list(folder.iterdir())


def test_a_folder_that_cannot_be_written_is_still_loaded_from(
    folder: Path, log_lines: LogLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(add(), folder)
    log_lines()

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise PermissionError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("os.utime", fail)
    make(add(), folder)
    assert log_lines()[0].startswith("loaded")


def test_what_came_from_jaxs_own_cache_is_not_saved(folder: Path, tmp_path: Path, log_lines: LogLines) -> None:
    """Such a program loads, and fails when it is called."""
    try:
        jax.config.update("jax_compilation_cache_dir", str(tmp_path / "jax"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        make(add(), None)  # saved by JAX
        log_lines()
        assert int(make(add(), folder)(state(), np.int32(1))[0].count) == 4
        line, warning = log_lines()
        assert line.startswith("compiled") and "was not saved" in warning and "JAX's own cache" in warning
        assert not list(folder.iterdir())
        make(add(weight=3.0), folder)  # not in JAX's
        assert len(list(folder.iterdir())) == 1
    finally:
        jax.config.update("jax_compilation_cache_dir", None)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
        compilation_cache.reset_cache()


def test_the_last_used_files_of_a_name_are_kept(folder: Path, log_lines: LogLines) -> None:
    def facts(i: int) -> dict[str, str]:
        return FACTS | {"jaxlib": str(i)}

    def age(path: Path, days: int) -> None:
        os.utime(path, (time.time() - 86400 * days,) * 2)

    make(add("add rows 5 of 6"), folder)  # whose name begins alike
    (other,) = folder.iterdir()
    age(other, 90)
    paths: list[Path] = []
    for i in range(store.KEEP):
        make(add(), folder, facts(i))
        (path,) = set(folder.iterdir()) - {other, *paths}
        paths.append(path)
    for i, path in enumerate(paths):
        age(path, 9 - i)  # the first is the oldest,
    make(add(), folder, facts(0))  # but now it is used
    stale, fresh = folder / ".a.tmp", folder / ".b.tmp"
    stale.touch()
    fresh.touch()
    age(stale, 1)
    make(add(), folder, facts(store.KEEP))
    left = set(folder.iterdir())
    assert {other, paths[0], *paths[2:], fresh} < left
    assert paths[1] not in left and stale not in left
    assert len(left) == store.KEEP + 2


def test_a_published_folder_is_loaded_from_and_left_alone(folder: Path, log_lines: LogLines) -> None:
    for number in range(store.KEEP + 1):
        compiled([add(weight=float(number))], folder=folder / "draft", fingerprint=FACTS)
        for path in (folder / "draft").glob("*.xla"):
            store.publish(path, folder / path.name)
            path.unlink()
    (folder / store.PUBLISHED).write_text("{}")
    before = {path: path.read_bytes() for path in folder.glob("*.xla")}
    assert len(before) == store.KEEP + 1
    assert {stat.S_IMODE(path.stat().st_mode) for path in before} == {0o444}
    log_lines()
    make(add(weight=1.0), folder)
    make(add(weight=99.0), folder)
    lines = log_lines()
    assert [line.split()[0] for line in lines[:2]] == ["loaded", "compiled"] and "was not saved: jobs/" in lines[2]
    assert {path: path.read_bytes() for path in folder.glob("*.xla")} == before
    assert not list(folder.glob(".*.tmp"))


def test_names_must_differ() -> None:
    with pytest.raises(ValueError, match="names of their own"):
        compiled([add(), add()], folder=None, fingerprint=FACTS)


def test_only_functions_are_programs() -> None:
    """What a method's object holds could change without anyone seeing it in the key."""
    for function in (LogLines.__eq__, partial([].append), jax.jit(fresh)):
        with pytest.raises(ValueError, match="add: function must be a function or a partial of one"):
            Program("add", function, ())


def test_what_fails_to_compile_fails_here(folder: Path) -> None:
    def broken(x: jax.Array) -> jax.Array:
        raise KeyError("no such block")

    with pytest.raises(KeyError, match="no such block"):
        compiled([add(), Program("broken", broken, (shape(2),))], folder=folder, fingerprint=FACTS)


# Processes and devices

MESH = """
import logging, sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from tests.aot.test_program import mesh_programs, state_on
from app.aot.cache_key import fingerprint
from app.aot.compile import compiled
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
assert jax.device_count() == 4
for order in ([0, 1, 2, 3], [2, 0, 3, 1], [3]):
    devices = [jax.devices()[i] for i in order]
    programs = mesh_programs(devices)
    made = compiled(programs, folder=Path(sys.argv[1]), fingerprint=fingerprint(devices))
    step, place = made[programs[0].name], state_on(devices)
    given = place()
    for _ in range(3):
        before = given
        given, total = step(given, np.arange(8, dtype=np.int32))
        assert before.x.is_deleted()
    assert given.x.sharding.device_set == set(devices), given.x.sharding
    expected = np.arange(8) + 3 * np.arange(8)
    assert np.array_equal(given.x, expected) and int(total) == expected.sum(), (given, total)
print("right")
"""


def mesh_of(devices: list[Any]) -> Mesh:
    return Mesh(np.array(devices), ("data",))


def mesh_step(mesh: Mesh, state: State, rows: jax.Array) -> tuple[State, jax.Array]:
    x = jax.lax.with_sharding_constraint(state.x + rows.astype(jnp.float32), NamedSharding(mesh, PartitionSpec("data")))
    return State(x, state.count + 1), x.sum()


def mesh_programs(devices: list[Any]) -> list[Program]:
    mesh = mesh_of(devices)
    split, everywhere = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    on = partial(jax.ShapeDtypeStruct, sharding=everywhere)
    donated = State(jax.ShapeDtypeStruct((8,), jnp.float32, sharding=split), on((), jnp.int32))
    arguments = (donated, on((8,), jnp.int32))
    out_shardings = (State(split, everywhere), everywhere)
    return [Program("step", partial(mesh_step, mesh), arguments, (0,), out_shardings)]


def state_on(devices: list[Any]) -> Callable[[], State]:
    mesh = mesh_of(devices)
    split, everywhere = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    return lambda: State(jax.device_put(np.arange(8, dtype=np.float32), split), jax.device_put(np.int32(0), everywhere))


@pytest.mark.slow
def test_processes_that_start_at_once_share_a_folder_and_the_next_loads_on_its_mesh(folder: Path) -> None:
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", MESH, str(folder)]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    both = [start(), start()]
    for process in both:
        out = process.communicate()[0]
        assert process.returncode == 0 and out.endswith("right\n"), out
    assert len(list(folder.iterdir())) == 3  # one for each order of devices
    third = start()
    out = third.communicate()[0]
    assert third.returncode == 0 and out.count("loaded step") == 3 and "compiled" not in out, out


# After readiness


def fresh(value: float) -> jax.Array:
    """Compiles whatever value it is given for the first time."""
    return jax.jit(lambda x: x * value)(np.float32(1))


def test_compiles_after_readiness_are_counted_and_logged_as_errors(
    watch: CompileWatch, caplog: pytest.LogCaptureFixture
) -> None:
    fresh(1.25)
    assert watch.count == 0
    watch.ready()
    watch.ready()  # once is enough

    def undeclared(x: jax.Array) -> jax.Array:
        return x + 1

    late = jax.jit(undeclared)
    late(np.float32(1))
    assert watch.count == 1
    late(np.float32(2))
    assert watch.count == 1
    late(np.zeros(2, np.float32))
    assert watch.count == 2
    errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 2 and all("jit(undeclared) was compiled while serving" in line for line in errors)


def test_watches_stand_beside_each_other_and_end(watch: CompileWatch) -> None:
    other = CompileWatch()
    watch.ready()
    fresh(2.25)
    other.ready()
    fresh(3.25)
    other.close()
    other.close()
    fresh(4.25)
    assert (watch.count, other.count) == (3, 1)
    watch.close()
    fresh(5.25)
    assert watch.count == 3
