"""README.md, CONTRIBUTING.md, CHANGELOG.md and docs/ held to the repository: links, commands, configuration keys, error
messages. The curl examples run in tests/on_cluster/test_api.py."""

import ast
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote
from xml.etree import ElementTree

import pytest
import yaml
from pydantic import BaseModel
from ray.serve._private.config import DeploymentConfig
from ray.serve.config import AutoscalingConfig, BackpressureConfig, RequestRouterConfig
from ray.serve.schema import HTTPOptionsSchema, ServeApplicationSchema, ServeDeploySchema

from app.api.field_descriptions import DESCRIPTIONS
from app.api.protocol import BODY_FIELDS, EDIT_NEUTRAL, FIELDS, NEUTRAL, QUERY_FIELDS
from app.builders import Args
from app.diffusion.samplers import SAMPLERS
from app.ray_internals.serve import DEFAULT_AUTOSCALING_POLICY_NAME
from app.serving.autoscaling import Rule
from cluster import install
from tests.docs_commands import API, MARKERS, NOT_RUN, PAGES, ROOT, RUN, blocks, commands

README_BYTES = 10_000
TUNING = ROOT / "docs" / "tuning.md"
MAKEFILE = (ROOT / "Makefile").read_text()
SHIPPED: Mapping[str, Any] = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
PACKAGES = (
    "app",
    "benchmarks",
    "capacity",
    "cluster",
    "configs",
    "demo",
    "docs",
    "jobs",
    "loadtest",
    "rehearsal",
    "tests",
)
ids = [str(page.relative_to(ROOT)) for page in PAGES]
each_page = pytest.mark.parametrize("page", PAGES, ids=ids)


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^```[^\n]*\n.*?^```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)


def inline_code(page: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(page))


# Links


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ +(.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: Path) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", prose(page))


@each_page
def test_every_link_leads_to_a_file_and_every_anchor_to_a_heading(page: Path) -> None:
    broken = []
    for link in links(page):
        if link.startswith(("https://", "http://")):
            continue
        name, _, anchor = unquote(link).partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


def test_every_page_of_docs_is_linked_from_the_readme() -> None:
    linked = {link.partition("#")[0] for link in links(ROOT / "README.md")}
    missing = {str(page.relative_to(ROOT)) for page in PAGES[1:]} - linked
    assert not missing


@each_page
def test_every_path_in_backticks_exists(page: Path) -> None:
    paths = [code for code in inline_code(page) if re.fullmatch(rf"({'|'.join(PACKAGES)})/[\w./-]*", code)]
    assert not [path for path in paths if not (ROOT / path).exists()]


@each_page
def test_every_test_that_is_named_exists(page: Path) -> None:
    named = {code for code in inline_code(page) if re.fullmatch(r"test_\w+", code)}
    sources = "".join(file.read_text() for file in sorted((ROOT / "tests").rglob("test_*.py"))) if named else ""
    assert not {name for name in named if f"def {name}(" not in sources}


def test_the_readme_is_a_front_page() -> None:
    assert len((ROOT / "README.md").read_bytes()) < README_BYTES


@pytest.mark.parametrize("file", sorted((ROOT / "assets").glob("*.svg")), ids=lambda file: file.name)
def test_drawings_are_well_formed_and_have_a_title(file: Path) -> None:
    drawing = ElementTree.parse(file).getroot()
    assert drawing.find("{http://www.w3.org/2000/svg}title") is not None


# Commands


def test_every_block_of_commands_says_how_it_is_tested() -> None:
    unmarked = [str(block) for page in PAGES for block in blocks(page) if block.language == "bash" and not block.marker]
    assert not unmarked
    assert {block.marker for page in PAGES for block in blocks(page)} <= {*MARKERS, ""}


@each_page
def test_a_block_has_a_known_language_and_no_markdown_in_it(page: Path) -> None:
    for block in blocks(page):
        assert block.language in ("bash", "console", "json", "python", "text"), block
        assert "](" not in block.text, block


def shown(page: Path) -> list[str]:
    """Every command that a page names, in fences and in backticks; a row of shell commands apart."""
    named = [command for block in blocks(page) for command in block.commands]
    return [part.strip() for text in [*named, *inline_code(page)] for part in re.split(r"&&|;(?!\S)|\|", text)]


def make_calls(page: Path) -> Iterator[list[str]]:
    for command in shown(page):
        for call in re.findall(r'(?:^|"\$\()make(?: [^()]*|$)', command):
            yield shlex.split(call.removeprefix('"$('))[1:]


def targets() -> set[str]:
    names = re.findall(r"^([a-z][a-z -]*):(?!=)", MAKEFILE, re.MULTILINE)
    return {target for line in names for target in line.split()}


def variables() -> set[str]:
    return {
        *re.findall(r"^([A-Z_]+) \?=", MAKEFILE, re.MULTILINE),
        *re.findall(r"\$\((?:or \$\()?([A-Z_]+)\)", MAKEFILE),
    }


@each_page
def test_every_make_verb_and_variable_exists(page: Path) -> None:
    unknown = []
    for words in make_calls(page):
        for word in words:
            name, equals, value = word.partition("=")
            if equals:
                unknown += [word] if name not in variables() else []
                unknown += [word] if name in ("CONFIG", "CLUSTER", "TWIN") and not file_or_dots(value) else []
            elif word not in targets() and not word.startswith("-"):
                unknown.append(word)
    assert not unknown


def file_or_dots(value: str) -> bool:
    return value in ("", "...", "local") or (ROOT / value).is_file()


@each_page
def test_a_variable_in_backticks_is_one_of_the_makefile(page: Path) -> None:
    named = [match[1] for code in inline_code(page) if (match := re.fullmatch(r"([A-Z_]+)=\S*", code))]
    elsewhere = {name for name in named if name.startswith("RAY_") or name == "IMAGINE_API_KEY"}
    assert not {*named} - variables() - elsewhere


def test_every_verb_is_named_in_some_page() -> None:
    verbs = set(re.findall(r"^([a-z-]+):.*## ", MAKEFILE, re.MULTILINE)) - {"help"}
    missing = verbs - {word for page in PAGES for words in make_calls(page) for word in words}
    assert not missing


def module_file(module: str) -> Path | None:
    path = ROOT / module.replace(".", "/")
    files = (path.with_suffix(".py"), path / "__main__.py")
    return next((file for file in files if file.is_file()), None)


@cache
def options(module: str) -> set[str]:
    """The options that a command line declares, in the module or in one that it imports of its own package."""
    file = module_file(module)
    assert file
    sources = {file, *(path for path in file.parent.rglob("*.py") if re.search(rf"\b{path.stem}\b", file.read_text()))}
    strings: set[str] = set()
    for source in sources:
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("-"):
                strings.add(node.value)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):  # the Recipe of demo.train
                strings.add(f"--{node.target.id.replace('_', '-')}")
    return strings


def module_calls(page: Path) -> Iterator[tuple[str, list[str]]]:
    """Modules with the options that a page gives them, by python -m, make job and make loadtest."""
    for command in shown(page):
        if match := re.search(r"python\S* -m ([\w.]+)(.*)", command):
            yield match[1], option_names(shlex.split(match[2]))
    jobs = {"train_demo": "demo.train", "demo_quality": "demo.quality"}
    for words in make_calls(page):
        values = dict(word.split("=", 1) for word in words if "=" in word)
        if "job" in words and "JOB" in values:
            module = jobs.get(values["JOB"], f"jobs.{values['JOB']}")
            yield module, option_names(shlex.split(values.get("ARGS", "")))
        elif "loadtest" in words:
            yield "loadtest", option_names(shlex.split(values.get("ARGS", "")))


def option_names(words: list[str]) -> list[str]:
    return [word.partition("=")[0] for word in words if word.startswith("-") and word not in ("--help", "-h")]


@each_page
def test_every_module_exists_and_takes_the_options_that_are_shown(page: Path) -> None:
    wrong = []
    for module, names in module_calls(page):
        if module == "pytest":
            continue
        if not module_file(module):
            wrong.append(module)
        else:
            wrong += [f"{module} {name}" for name in names if name not in options(module)]
    assert not wrong


@pytest.mark.slow
@pytest.mark.slow
@pytest.mark.parametrize("command", commands(RUN))
def test_a_cheap_command_runs(command: str) -> None:
    venv = Path(sys.prefix)
    if command.startswith("make") and not install.current(venv, "runtime"):
        pytest.skip("make would install into the environment of these tests")
    command = re.sub(r"^make\b", f"make VENV={shlex.quote(str(venv))}", command)
    command = command.replace(".venv/bin/python", shlex.quote(sys.executable))
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout and not done.stderr, done.stdout + done.stderr


def test_the_commands_that_no_test_runs_can_be_listed() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.docs_commands"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert all(reason in done.stdout for reason in NOT_RUN.values())


def test_the_readme_and_the_page_of_the_api_have_curls_to_run() -> None:
    for page in ("README.md", "docs/api.md"):
        assert len(commands(API, ROOT / page)) >= 3, page


# Configuration keys


def rows(page: Path, heading: str) -> Iterator[list[str]]:
    """The rows of the tables below a heading, down to the next heading of its level or above."""
    level = heading.partition(" ")[0]
    text = prose(page).partition(f"\n{heading}\n")[2]
    text = re.split(rf"^#{{1,{len(level)}}} ", text, flags=re.MULTILINE)[0]
    for line in text.splitlines():
        if line.startswith("| `"):
            yield [cell.strip() for cell in line.strip("|").split(" | ")]


def table(heading: str) -> dict[str, tuple[str, str]]:
    """Key -> default and shipped value, as docs/tuning.md has them."""
    return {row[0].strip("` |"): (row[1].strip("` "), row[2].strip("` ")) for row in rows(TUNING, heading)}


def leaves(model: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """Key -> default of a model and of those in it; "required" where there is none."""
    defaults: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            defaults |= leaves(field.annotation, f"{name}.")
        else:
            default = "required" if field.is_required() else field.get_default(call_default_factory=True)
            defaults[prefix + name] = list(default) if isinstance(default, tuple) else default
    return defaults


def at(content: Any, key: str) -> Any:
    for part in key.split("."):
        content = content[part]
    return content


def flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys; `resources` stays whole, as its keys are names of resources."""
    keys: dict[str, Any] = {}
    for name, value in content.items():
        if isinstance(value, dict) and name not in ("args", "resources"):
            keys |= flat(value, f"{prefix}{name}.")
        else:
            keys[prefix + name] = value
    return keys


def test_tuning_has_every_key_of_args_with_its_default_and_the_shipped_value() -> None:
    documented, defaults = table("## The app: `args`"), leaves(Args)
    assert documented.keys() == defaults.keys()
    args = SHIPPED["applications"][0]["args"]
    for key, (default, shipped) in documented.items():
        assert yaml.safe_load(default) == defaults[key], key
        assert yaml.safe_load(shipped) == at(args, key), key


def serve_defaults() -> dict[str, Any]:
    deployment = DeploymentConfig()
    return {
        **leaves(ServeDeploySchema),
        **{f"http_options.{key}": value for key, value in leaves(HTTPOptionsSchema).items()},
        **{f"applications.{key}": value for key, value in leaves(ServeApplicationSchema).items()},
        **{name: getattr(deployment, name) for name in DeploymentConfig.model_fields},
        **{f"autoscaling_config.{key}": value for key, value in leaves(AutoscalingConfig).items()},
        **{f"backpressure_config.{key}": value for key, value in leaves(BackpressureConfig).items()},
        **{f"request_router_config.{key}": value for key, value in leaves(RequestRouterConfig).items()},
        "autoscaling_config.policy.policy_function": DEFAULT_AUTOSCALING_POLICY_NAME,
        **{f"autoscaling_config.policy.policy_kwargs.{key}": value for key, value in vars(Rule()).items()},
        "name": "required",
        "ray_actor_options.num_cpus": 1,  # what Ray takes for an actor of Serve that says nothing
        "ray_actor_options.resources": {},
    }


SERVE_KEYS = [
    ("### The proxy", {name: value for name, value in SHIPPED.items() if name != "applications"}),
    ("### The application", {"applications": SHIPPED["applications"][0]}),
    ("### The ingress deployment: `APIIngress`", SHIPPED["applications"][0]["deployments"][0]),
    ("### The model deployment: `StableDiffusion`", SHIPPED["applications"][0]["deployments"][1]),
]


@pytest.mark.parametrize(("heading", "content"), SERVE_KEYS, ids=[heading for heading, _ in SERVE_KEYS])
def test_tuning_has_every_key_of_serve_that_the_shipped_config_sets(heading: str, content: dict[str, Any]) -> None:
    documented, shipped = table(heading), flat(content)
    assert documented.keys() == shipped.keys()
    for key, (default, value) in documented.items():
        if key not in ("applications.args", "applications.deployments"):  # which have tables of their own
            assert yaml.safe_load(value) == shipped[key], key
        assert yaml.safe_load(default) == yaml_of(serve_defaults()[key]), key


def yaml_of(default: Any) -> Any:
    """As a YAML file would write it: an enum by its value."""
    return getattr(default, "value", default)


# The API


def test_the_page_of_the_api_has_every_field_and_every_sampler() -> None:
    page = ROOT / "docs" / "api.md"
    fields = {name for row in rows(page, "## Fields") for name in re.findall(r"`(\w+)`", row[0])}
    assert fields == {*FIELDS, "image", "images", "mask", *(name for name, values in EDIT_NEUTRAL.items() if values)}
    for row in [*rows(page, "## Fields"), *rows(TUNING, "### Defaults of a request: `args.defaults`")]:
        if "sampler`" in row[0]:
            assert all(f"`{name}`" in " | ".join(row) for name in SAMPLERS), row


def test_the_table_of_fields_has_the_descriptions_of_the_openapi_document() -> None:
    documented = {name: row for row in rows(ROOT / "docs" / "api.md", "## Fields") for name in words_in_code(row[0])}
    assert documented.keys() == DESCRIPTIONS.keys()
    for name, row in documented.items():
        text = " | ".join(row[2:])
        assert text.replace(" (POST)", "").replace(" (edits)", "").startswith(DESCRIPTIONS[name]), name
        assert ("(POST)" in text) == (name in {*BODY_FIELDS, *NEUTRAL} - {*QUERY_FIELDS}), name
        assert ("(edits)" in text) == (name not in {*BODY_FIELDS, *NEUTRAL}), name


def words_in_code(text: str) -> list[str]:
    return re.findall(r"`(\w+)`", text)


def test_the_page_of_the_api_has_every_error_code() -> None:
    positions, codes = {"ApiError": 3, "InvalidField": 2}, set[str]()
    for file in [*(ROOT / "app" / "api").rglob("*.py"), *(ROOT / "app" / "serving").glob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in positions:
                arguments = node.args[positions[node.func.id] :][:1]
                codes |= {str(argument.value) for argument in arguments if isinstance(argument, ast.Constant)}
    documented = prose(ROOT / "docs" / "api.md").partition("## Errors")[2]
    assert len(codes) > 10
    missing = {code for code in codes if f"`{code}`" not in documented}
    assert not missing


# Error messages


@cache
def sentences() -> str:
    """Every string of the code, one a line, with a NUL for each value that is filled in."""
    lines = []
    for package in ("app", "capacity", "cluster", "demo", "jobs", "loadtest", "benchmarks"):
        for file in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.JoinedStr):
                    parts = [str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values]
                    lines.append("".join(parts).replace("\n", " "))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    lines.append(node.value.replace("\n", " "))
    return "\n".join(lines)


def messages() -> list[str]:
    page = ROOT / "docs" / "troubleshooting.md"
    return [
        row[0].strip("`| ")
        for line in re.findall(r"^## (.+)$", prose(page), re.MULTILINE)
        for row in rows(page, f"## {line}")
    ]


@pytest.mark.parametrize("message", messages())
def test_a_message_in_troubleshooting_is_one_of_the_code(message: str) -> None:
    """By its fixed words: what stands in <angle brackets> may be any part of a sentence."""
    fixed = [part.strip() for part in re.split(r"<[^<>]*>", message) if part.strip(" .,:;()")]
    pattern = r"[^\n]*".join(map(re.escape, fixed))
    assert re.search(pattern, sentences()), message


# Tooling files


def test_the_workflow_and_the_hooks_call_what_is_there() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    steps = workflow["jobs"]["test"]["steps"]
    assert [step["run"] for step in steps if "run" in step] == ["bash .ci/run"]
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@v[\d.]+", step["uses"]) for step in steps if "uses" in step)
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repository["repo"] for repository in hooks] == ["local"], "nothing is downloaded"
    called = [hook["entry"] for hook in hooks[0]["hooks"]]
    assert all(entry.startswith((".venv/bin/python -m ", "make check")) for entry in called)
