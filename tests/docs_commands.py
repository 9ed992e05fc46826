"""Shell commands in the fenced blocks of the documentation, by the marker in the fence that says how they are tested.

`python -m tests.docs_commands` lists those that no test runs. Knows nothing of what the commands do.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
RUN, API = "run", "api"  # run by tests/test_docs.py, and against a deployed cluster by tests/on_cluster
NOT_RUN = {
    "checkout": "writes into the checkout",
    "cluster": "starts or needs a local cluster",
    "slow": "installs, or takes minutes",
    "cloud": "needs Google Cloud or a server",
}
MARKERS = (RUN, API, *NOT_RUN)
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One fenced block: ```bash run, for example."""

    page: Path
    line: int
    language: str
    marker: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def commands(self) -> list[str]:
        """One command a line; a backslash joins lines. Of a console session, the lines after `$ `."""
        lines = self.text.replace("\\\n", " ").splitlines()
        if self.language == "console":
            lines = [line[2:] for line in lines if line.startswith("$ ")]
        elif self.language != "bash":
            return []
        stripped = (re.sub(r"(^|\s)#(?=\s).*$", "", line).strip() for line in lines)
        return [re.sub(r"\s+", " ", line) for line in stripped if line]


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text("utf-8")
    for fence in FENCE.finditer(text):
        language, _, marker = fence[1].partition(" ")
        yield Block(page, text.count("\n", 0, fence.start()) + 1, language, marker, fence[2])


def commands(marker: str, *pages: Path) -> list[str]:
    """The commands of these pages, or of all, in blocks with this marker."""
    return [
        command
        for page in pages or PAGES
        for block in blocks(page)
        if block.marker == marker
        for command in block.commands
    ]


if __name__ == "__main__":
    for marker, reason in NOT_RUN.items():
        print(f"Not run by any test, because it {reason}:")
        for command in commands(marker):
            print(f"  {command}")
