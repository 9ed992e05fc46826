"""Generates eight sample images through the running API, as any client would, edits one of them, and makes a contact
sheet of all, the edit beside what it was made of."""

import base64
import json
import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from PIL import Image

from app.diffusion.images import contact_sheet
from cluster import ROOT, processes
from cluster.cli import Parser, UserError, run_command
from cluster.dashboard import serve_address
from cluster.local.state import RUN_DIR, running
from cluster.terminal import Progress, format_duration, say

PROMPTS = (  # of words that the bundled model knows, see demo/scenes
    "a red house under a yellow sun at dusk",
    "a blue boat by day",
    "a big green tree in the snow",
    "a yellow moon above a purple house at night",
    "a pink flower next to a red mushroom on a cream background",
    "an orange fish on a white background",
    "a teal balloon over an orange car by day",
    "a purple umbrella on a grey background",
)
EDITED, EDIT = PROMPTS[1], "a red boat by day"
SEED = 1
CONCURRENCY = 4  # requests share steps, and the first images still come soon
TIMEOUT_S = 300.0


def draw(api: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pictures: dict[str, bytes] = {}
    with Progress() as progress, ThreadPoolExecutor(CONCURRENCY) as pool:
        progress.show({"pictures": (f"0 of {len(PROMPTS)}", "")})
        waiting = {pool.submit(generate, api, prompt, SEED + i): (i, prompt) for i, prompt in enumerate(PROMPTS)}
        try:
            for done in as_completed(waiting):
                i, prompt = waiting[done]
                pictures[prompt] = done.result()
                (folder / f"{i + 1}-{re.sub('[^a-z0-9]+', '-', prompt)}.png").write_bytes(pictures[prompt])
                progress.show({"pictures": (f"{len(pictures)} of {len(PROMPTS)}", prompt)})
        finally:
            pool.shutdown(cancel_futures=True)
        before_and_after = []
        if takes_edits(api):
            progress.show({"pictures": (f"{len(pictures)} of {len(PROMPTS)}", f"now edited: {EDIT}")})
            after = edit(api, pictures[EDITED], EDIT, SEED)
            (folder / f"{len(PROMPTS) + 1}-edited-{re.sub('[^a-z0-9]+', '-', EDIT)}.png").write_bytes(after)
            before_and_after = [(pictures[EDITED], f"before: {EDITED}"), (after, f"edited: {EDIT}")]
    cells = [*((pictures[prompt], prompt) for prompt in PROMPTS), *before_and_after]
    sheet = folder / "contact_sheet.png"
    contact_sheet([Image.open(BytesIO(file)) for file, _ in cells], [text for _, text in cells], columns=4).save(sheet)
    took = format_duration(progress.elapsed)
    edits = " and edited one" if before_and_after else ""
    say(f"Generated {len(pictures)} images{edits} in {took}: {shown(sheet)}. The single images are beside it")


def generate(api: str, prompt: str, seed: int) -> bytes:
    return picture(api, "generations", {"prompt": prompt, "seed": seed, "output_format": "png"})


def edit(api: str, image: bytes, prompt: str, seed: int) -> bytes:
    link = f"data:image/png;base64,{base64.b64encode(image).decode()}"
    fields = {"prompt": prompt, "seed": seed, "output_format": "png", "images": [{"image_url": link}]}
    return picture(api, "edits", fields)


def takes_edits(api: str) -> bool:
    """Whether the model that is served begins from images."""
    (model, *_) = ask(f"{api}/v1/models", None, "GET /v1/models")["data"]
    return bool(model.get("capabilities", {}).get("edits"))


def picture(api: str, route: str, fields: Mapping[str, Any]) -> bytes:
    answer = ask(f"{api}/v1/images/{route}", json.dumps(fields).encode(), f"'{fields['prompt']}'")
    return base64.b64decode(answer["data"][0]["b64_json"])


def ask(url: str, body: bytes | None, what: str) -> Any:
    """The answer to a GET, or to a POST of a body of JSON."""
    request = Request(url, body, {"Content-Type": "application/json"} | processes.credentials())
    try:
        with urlopen(request, timeout=TIMEOUT_S) as answer:
            return json.load(answer)
    except HTTPError as error:
        if error.code == 401:
            raise UserError(f"The API needs a key. Set the environment variable {processes.API_KEY}.") from None
        raise UserError(f"The API answers {error.code} to {what}: {error.read().decode()[:500]}") from None
    except (URLError, TimeoutError, ConnectionError) as error:
        api = url.partition("/v1/")[0]
        raise UserError(f"The API at {api} does not answer: {error}. See: make status") from None


def shown(path: Path) -> str:
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def invitation(api: str, dashboard: str) -> str:
    return f"""
The page       {api}/  (in a browser)
The API        {api}
The dashboard  {dashboard}

Try:
  curl -o boat.png '{api}/imagine?prompt=a+red+boat+under+a+yellow+sun+at+dusk&seed=7'
  curl {api}/v1/images/generations -H 'Content-Type: application/json' \\
       -d '{{"prompt": "a green tree in the snow", "n": 2, "num_inference_steps": 30, "output_format": "webp"}}'
  curl {api}/v1/models

Stop it all with: make down"""


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "outputs")
    parser.add_argument("--run-dir", type=Path, default=RUN_DIR)
    arguments = parser.parse_args()
    os.environ.update(processes.past_proxies())
    cluster = running(arguments.run_dir.resolve())
    dashboard = cluster.dashboard
    details = dashboard.details()
    if not details["applications"]:
        raise UserError("Nothing is deployed. Deploy with: make deploy")
    draw(serve_address(details), arguments.out.resolve())
    say(invitation(serve_address(details), f"{dashboard.address}  asks once for the token in {cluster.token_file}"))


if __name__ == "__main__":
    run_command(main)
