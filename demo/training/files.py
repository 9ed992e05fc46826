"""JSON as the files of a checkpoint have it."""

import json
from pathlib import Path
from typing import Any


def write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")
