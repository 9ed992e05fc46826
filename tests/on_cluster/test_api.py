"""The API on a real local Ray, a real Serve and real HTTP, as serve_config.yaml deploys it, with one replica."""

import asyncio
import base64
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import Request, urlopen

import numpy as np
import psutil
import pytest
from openai import AsyncOpenAI, AuthenticationError, NotFoundError, OpenAI, RateLimitError
from PIL import Image
from ray.serve.metrics import Counter, Histogram
from ray.util.metrics import Metric

from app.serving.metrics import Metrics
from cluster import ROOT, sample_images
from cluster.local.state import Cluster
from demo import scenes
from tests import many_clients
from tests.clusters import Verbs, fetch, refuses, soon, succeeds
from tests.docs_commands import API, blocks, commands

pytestmark = pytest.mark.cluster

PROMPT = "a red house under a yellow sun at dusk"


def imagine(api: str, **query: object) -> tuple[int, bytes, dict[str, str]]:
    return fetch(f"{api}/imagine?{urlencode(query)}")


def described(api: str) -> dict[str, Any]:
    status, body, _ = fetch(f"{api}/v1/models")
    assert status == 200
    model: dict[str, Any] = json.loads(body)["data"][0]
    return model


def refusal(answer: tuple[int, bytes, dict[str, str]]) -> tuple[int, dict[str, Any]]:
    status, body, headers = answer
    assert headers["content-type"].startswith("application/json")
    error: dict[str, Any] = json.loads(body)["error"]
    assert {"message", "type", "param", "code"} <= set(error)
    return status, error


def test_imagine_answers_a_png_that_says_how_it_was_made(api: str) -> None:
    status, body, headers = imagine(api, prompt=PROMPT, seed=7)
    headers = {name.lower(): value for name, value in headers.items()}
    assert (status, headers["content-type"]) == (200, "image/png")
    image = Image.open(BytesIO(body))
    assert f"{image.width}x{image.height}" == described(api)["sizes"][0]
    assert image.text["seed"] == headers["x-seed"] == "7"  # type: ignore[attr-defined]
    assert image.convert("L").getextrema()[0] != image.convert("L").getextrema()[1], "not a blank page"


def test_the_same_seed_gives_the_same_bytes_at_both_doors_and_another_seed_does_not(api: str) -> None:
    first, second = (imagine(api, prompt=PROMPT, seed=7)[1] for _ in range(2))
    status, body, _ = fetch(f"{api}/v1/images/generations", {"prompt": PROMPT, "seed": 7})
    data = json.loads(body)["data"]
    assert status == 200 and len(data) == 1 and data[0]["seed"] == 7
    other = imagine(api, prompt=PROMPT, seed=8)[1]
    pixels = [Image.open(BytesIO(png)).tobytes() for png in (first, base64.b64decode(data[0]["b64_json"]), other)]
    assert first == second and pixels[0] == pixels[1] != pixels[2]


def test_requests_at_the_same_time_each_get_their_own(api: str) -> None:
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda seed: imagine(api, prompt=PROMPT, seed=seed), range(6)))
    assert [status for status, _, _ in together] == [200] * 6
    assert len({body for _, body, _ in together}) == 6


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"guidance_scale": -1}, "guidance_scale"),
        ({"sampler": "magic"}, "sampler"),
        ({"size": "33x33"}, "size"),
        ({"n": 1000}, "n"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_a_bad_request_is_a_400_that_names_the_field(api: str, change: dict[str, object], param: str) -> None:
    status, error = refusal(fetch(f"{api}/v1/images/generations", {"prompt": PROMPT} | change))
    assert (status, error["param"], error["type"]) == (400, param, "invalid_request_error")


def test_other_mistakes_have_their_own_status(api: str) -> None:
    assert refusal(fetch(f"{api}/v1/images/generations", b"{"))[0] == 400
    assert refusal(fetch(f"{api}/v1/images/generations"))[0] == 405
    assert refusal(fetch(f"{api}/nowhere"))[0] == 404
    assert refusal(fetch(f"{api}/v1/images/generations", {"prompt": "x" * (1 << 20)}))[0] == 413


def test_the_model_is_described(api: str) -> None:
    model = described(api)
    assert {"id", "sizes", "samplers", "limits"} <= set(model)
    assert fetch(f"{api}/healthz")[0] == 200


# What the engine promises, over real HTTP. LONG is long enough for things to happen to it.

LONG = {"prompt": PROMPT, "num_inference_steps": 100, "n": 4, "seed": 7}


def stats(api: str) -> dict[str, Any]:
    status, body, _ = fetch(f"{api}/v1/stats")
    assert status == 200
    sums: dict[str, Any] = json.loads(body)
    return sums


def the_replica(api: str) -> dict[str, Any]:
    """The one that runs; load may have asked for a second one, for which this cluster may have no node."""
    (replica,) = [own for own in stats(api)["replicas"].values() if "error" not in own]
    return dict(replica)


@contextmanager
def posted(api: str, body: dict[str, Any]) -> Iterator[socket.socket]:
    """A client that has sent its request, and goes away at the end of the block."""
    content = json.dumps(body).encode()
    host, _, port = api.removeprefix("http://").partition(":")
    head = f"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n"
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(f"{head}Connection: close\r\nContent-Type: application/json\r\n\r\n".encode() + content)
        yield connection


def read_up_to(connection: socket.socket, words: bytes) -> bytes:
    """What comes until it has these words, or until the server closes."""
    data = b""
    while words not in data and (piece := connection.recv(65536)):
        data += piece
    return data


@pytest.mark.parametrize(
    ("streaming", "heard"),
    [({}, b""), ({"stream": True}, b"200 OK"), ({"stream": True, "partial_images": 3}, b"image_generation.partial")],
    ids=["plain", "stream", "stream with previews"],
)
def test_a_client_that_goes_away_frees_its_slots_and_harms_nobody(
    api: str, streaming: dict[str, Any], heard: bytes
) -> None:
    staying = {"prompt": PROMPT, "num_inference_steps": 50, "seed": 7}
    alone = fetch(f"{api}/v1/images/generations", staying)[1]
    before = stats(api)["total"]
    with ThreadPoolExecutor(1) as pool:
        with posted(api, LONG | streaming | ({"n": 1} if streaming else {})) as leaver:
            stayed = pool.submit(fetch, f"{api}/v1/images/generations", staying)
            assert soon(lambda: (now := stats(api)["total"])["unfinished"] == 2 and now["active_slots"] > 0)
            assert heard in read_up_to(leaver, heard)
        assert soon(lambda: stats(api)["total"]["requests"]["cancelled"] == before["requests"]["cancelled"] + 1)
        status, body, _ = stayed.result()
    assert status == 200
    apart = pixels(json.loads(body)["data"][0]) - pixels(json.loads(alone)["data"][0])
    assert abs(apart).max() <= 1, "a neighbour may change the bucket, and that the last bit of a float"
    after = stats(api)["total"]
    assert after["requests"]["completed"] == before["requests"]["completed"] + 1
    assert (after["active_slots"], after["unfinished"], after["backlog_s"]) == (0, 0, 0)


def pixels(image: dict[str, Any]) -> np.ndarray:
    with Image.open(BytesIO(base64.b64decode(image["b64_json"]))) as picture:
        return np.asarray(picture).astype(int)


def test_a_deadline_that_cannot_be_met_is_refused_at_once(api: str) -> None:
    before = stats(api)["total"]["requests"]
    answer = fetch(f"{api}/v1/images/generations", LONG | {"timeout": 1})
    status, error = refusal(answer)
    assert (status, error["code"], error["param"]) == (503, "deadline_unmeetable", "timeout")
    assert int({name.lower(): value for name, value in answer[2].items()}["retry-after"]) >= 1
    assert "and timeout is 1 s" in error["message"]
    assert stats(api)["total"]["requests"] == before | {"deadline": before["deadline"] + 1}


def test_under_overload_some_are_refused_and_all_others_answered(api: str) -> None:
    ask = {"prompt": PROMPT, "num_inference_steps": 10}
    with ThreadPoolExecutor(80) as pool:
        futures = [pool.submit(fetch, f"{api}/v1/images/generations", ask | {"seed": seed}) for seed in range(80)]
        answers = [future.result() for future in futures]
    refused = [refusal(answer) for answer in answers if answer[0] != 200]
    assert refused and all((status, error["code"]) == (503, "queue_full") for status, error in refused)
    answered = {seed: json.loads(body) for seed, (status, body, _) in enumerate(answers) if status == 200}
    assert len(answered) >= 32 and all(answer["data"][0]["seed"] == seed for seed, answer in answered.items())
    assert len({answer["data"][0]["b64_json"] for answer in answered.values()}) == len(answered)
    total = stats(api)["total"]
    assert (total["active_slots"], total["waiting"], total["unfinished"]) == (0, 0, 0)


def test_of_200_clients_those_who_stay_get_what_a_lone_one_gets_and_the_others_leave_nothing(api: str) -> None:
    many_clients.of_200_clients_some_disconnect_and_the_others_get_the_images_of_a_single_client(api)


def test_streams_that_nobody_reads_end_all_the_same_and_hold_up_nobody(api: str) -> None:
    many_clients.unread_streams_end_and_delay_nobody(api)


def test_a_browser_gets_the_page_and_the_page_sees_where_replicas_run(api: str) -> None:
    with urlopen(Request(f"{api}/", headers={"Accept": "text/html", "Sec-Fetch-Site": "none"})) as answer:
        index = answer.read().decode()
    names = re.findall(r'"page/([^"]+)"', index)
    assert {"main.js", "page.css"} <= {*names}
    for name in names:
        status, _, headers = fetch(f"{api}/page/{name}")
        assert status == 200 and headers["content-security-policy"].startswith("default-src 'none'")
    answered = stats(api)
    (replica,) = [own for own in answered["replicas"].values() if "error" not in own]
    (node,) = [node for node in answered["nodes"] if node["id"] == replica["node"]]
    assert node["resources"]["TPU"] > 0 and not node["head"]


def test_openais_client_retrieves_the_model_by_its_id(api: str) -> None:
    with OpenAI(base_url=f"{api}/v1", api_key="none", max_retries=0) as client:
        listed = client.models.list().data[0]
        assert client.models.retrieve(listed.id) == listed
        with pytest.raises(NotFoundError) as unknown:
            client.models.retrieve("CompVis/stable-diffusion-v1-4")
        assert unknown.value.code == "model_not_found" and unknown.value.param == "model"


def test_a_prompt_of_4000_characters_is_taken_cut_and_told_so(api: str) -> None:
    prompt = "\U0001f305" * 4000  # four bytes of UTF-8 each, twelve in a query
    status, body, _ = fetch(f"{api}/v1/images/generations", {"prompt": prompt, "num_inference_steps": 1})
    assert status == 200 and json.loads(body)["prompt_truncated"] is True
    status, _, headers = imagine(api, prompt=prompt, negative_prompt="x" * 1000, num_inference_steps=1)
    assert status == 200
    assert {name.lower(): value for name, value in headers.items()}["x-prompt-truncated"] == "true"
    prompt = "a house " * 250  # as long as was allowed once
    status, body, _ = fetch(f"{api}/v1/images/generations", {"prompt": prompt, "num_inference_steps": 1})
    assert status == 200 and json.loads(body)["prompt_truncated"] is True


@pytest.mark.parametrize("page", ["README.md", "docs/api.md"])
def test_the_curls_of_the_documentation_work(api: str, tmp_path: Path, page: str) -> None:
    for command in commands(API, ROOT / page):
        curl = command.replace("http://127.0.0.1:8000", api).replace("curl ", "curl --fail ", 1)
        done = subprocess.run(["bash", "-c", curl], cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, (command, done.stdout[-500:], done.stderr)
    for file in tmp_path.iterdir():
        with Image.open(file) as image:
            assert f"{image.width}x{image.height}" == described(api)["sizes"][0]
    assert (tmp_path / "boat.png").exists()


def run_python(page: Path, api: str) -> dict[str, Any]:
    """Runs the one Python program of a page, as a reader would, and returns its names."""
    (program,) = (block.text for block in blocks(page) if block.language == "python")
    names: dict[str, Any] = {}
    exec(program.replace("http://127.0.0.1:8000", api), names)
    return names


def test_the_python_of_the_page_of_the_api_draws_what_it_asks_for(api: str) -> None:
    (image,) = run_python(ROOT / "docs" / "api.md", api)["answer"].data
    _, body, _ = imagine(api, prompt="a red boat at dusk", seed=7, num_inference_steps=30)
    assert (pixels(image.to_dict()) == np.asarray(Image.open(BytesIO(body)))).all()


def test_the_commands_of_the_page_of_edits_work(api: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = ROOT / "docs" / "edits.md"
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    for command in commands(API, page):
        curl = command.replace("http://127.0.0.1:8000", api).replace("curl ", "curl --fail ", 1)
        done = subprocess.run(["bash", "-c", curl], cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, (command, done.stdout[-500:], done.stderr)
    monkeypatch.chdir(tmp_path)
    run_python(page, api)
    before, after = (
        np.asarray(Image.open(file)).astype(int) for file in ("assets/edits/red-boat.png", "blue-boat.png")
    )
    outside = np.asarray(Image.open("assets/edits/mask.png"))[..., 3] == 255
    assert np.abs(before - after)[outside].max() <= 2
    (thing,) = scenes.look(after.astype(np.uint8)).things
    assert (thing.colour, thing.kind) == ("blue", "boat")


def test_openais_own_client_works_against_it(api: str) -> None:
    with OpenAI(base_url=f"{api}/v1", api_key="none") as client:
        model = client.models.list().data[0].id
        answer = client.images.generate(model=model, prompt=PROMPT, extra_body={"seed": 7})
        stream = client.images.generate(
            model=model, prompt=PROMPT, stream=True, partial_images=2, extra_body={"seed": 7}
        )
        *partials, last = list(stream)
    assert answer.data and [event.type for event in partials] == ["image_generation.partial_image"] * 2
    assert [getattr(event, "partial_image_index", None) for event in partials] == [0, 1]
    drafts = [pixels(event.to_dict()) for event in partials]
    assert len({picture.tobytes() for picture in (*drafts, pixels(last.to_dict()))}) == 3, "pictures in the making"
    assert last.type == "image_generation.completed"
    assert (pixels(last.to_dict()) == pixels(answer.data[0].to_dict())).all()


def test_openais_async_client_works_against_it(api: str) -> None:
    async def draw() -> tuple[str | None, str | None]:
        async with AsyncOpenAI(base_url=f"{api}/v1", api_key="none") as client:
            answer = await client.images.generate(prompt=PROMPT, extra_body={"seed": 8})
            stream = await client.images.generate(prompt=PROMPT, stream=True, extra_body={"seed": 8})
            (event,) = [event async for event in stream]
            assert answer.data and event.type == "image_generation.completed"
            return answer.data[0].b64_json, event.b64_json

    whole, streamed = asyncio.run(draw())
    assert whole and whole == streamed


def test_every_metric_is_at_the_nodes_metrics_endpoint(api: str, verbs: Verbs) -> None:
    assert imagine(api, prompt=PROMPT)[0] == 200
    discovery = verbs.cluster.temp_dir / "ray" / "prom_metrics_service_discovery.json"
    names = {metric.info["name"]: metric for metric in vars(Metrics()).values() if isinstance(metric, Metric)}
    suffix = {Counter: "_total", Histogram: "_bucket"}
    wanted = {f"ray_{name}{suffix.get(type(metric), '')}" for name, metric in names.items()}

    def exported() -> dict[str, str]:
        (discovered,) = json.loads(discovery.read_text())  # as Prometheus finds them
        texts = [fetch(f"http://{target}/metrics")[1].decode() for target in discovered["targets"]]
        lines = [line for text in texts for line in text.splitlines()]
        return {line.partition("{")[0]: line for line in lines if line.startswith("ray_imagine_")}

    assert soon(lambda: wanted <= set(exported())), wanted - set(exported())  # Ray exports every 10 s
    for line in exported().values():
        assert 'application="text-to-image"' in line and 'deployment="StableDiffusion"' in line and 'replica="' in line


def test_nothing_is_compiled_while_it_serves_whatever_is_mixed(api: str) -> None:
    samplers, limits = described(api)["samplers"], described(api)["limits"]
    mix: list[dict[str, Any]] = [
        {"sampler": sampler, "num_inference_steps": 3 + i % 8, "guidance_scale": 1 + 3 * (i % 2), "n": 1 + i % 2}
        for i, sampler in enumerate(samplers[::2])
    ]
    mix += [{"output_format": "webp", "negative_prompt": "fog", "n": limits["images"], "num_inference_steps": 2}]
    mix += [{"stream": True, "partial_images": 1 + i, "num_inference_steps": 8} for i in range(3)]
    mix += [{"prompt": "long " * 200, "num_inference_steps": 1}]
    with ThreadPoolExecutor(len(mix)) as pool:
        answers = list(pool.map(lambda fields: fetch(f"{api}/v1/images/generations", {"prompt": PROMPT} | fields), mix))
    assert [status for status, _, _ in answers] == [200] * len(mix)
    assert the_replica(api)["compiles_after_ready"] == 0


def test_a_new_config_lets_requests_finish_on_the_old_replica(api: str, verbs: Verbs, tmp_path: Path) -> None:
    before, config = the_replica(api), tmp_path / "serve_config.yaml"
    config.write_text(verbs.config.read_text().replace("max_waiting: 32", "max_waiting: 31"))
    with ThreadPoolExecutor(2) as pool:
        plain = pool.submit(fetch, f"{api}/v1/images/generations", LONG)
        with posted(api, LONG | {"n": 1, "stream": True}) as streaming:
            assert soon(lambda: stats(api)["total"]["unfinished"] == 2)
            arguments = ("--config", str(config), "--serve-port", str(verbs.serve_port))
            deploying = pool.submit(verbs, "deploy", "deploy", *arguments)
            streamed = b"".join(iter(lambda: streaming.recv(65536), b""))
        status, body, _ = plain.result()
        assert (status, len(json.loads(body).get("data", []))) == (200, 4)
        assert b"image_generation.completed" in streamed
        succeeds(deploying.result())
    assert the_replica(api)["pid"] != before["pid"]


def test_a_replica_that_is_killed_is_replaced_and_its_requests_begin_again(api: str) -> None:
    before = the_replica(api)
    stream = LONG | {"n": 1, "stream": True, "partial_images": 3}
    # One after another from two clients, so that whenever the stream's first preview comes, something else is drawn.
    bodies = [LONG | {"n": 1, "num_inference_steps": steps} for steps in (100, 70) * 4]
    with ThreadPoolExecutor(2) as pool:
        plain = [pool.submit(fetch, f"{api}/v1/images/generations", body) for body in bodies]
        with posted(api, stream) as streaming:
            streamed = read_up_to(streaming, b"image_generation.partial")
            os.kill(before["pid"], signal.SIGKILL)  # a quarter of the stream's steps are done
            streamed += b"".join(iter(lambda: streaming.recv(65536), b""))
        answers = [answer.result() for answer in plain]
    assert [status for status, _, _ in answers] == [200] * len(bodies)
    assert any(json.loads(body).get("restarts") == 1 for _, body, _ in answers)
    assert b"image_generation.completed" in streamed and b'"restarts":1' in streamed.replace(b" ", b"")
    assert soon(lambda: imagine(api, prompt=PROMPT, seed=7)[0] == 200, timeout_s=600)
    after = the_replica(api)
    assert after["pid"] != before["pid"] and after["compiles_after_ready"] == 0


def test_the_demonstration_draws_a_sheet_and_says_how_to_go_on(api: str, verbs: Verbs, tmp_path: Path) -> None:
    output = succeeds(verbs("sample_images", "--out", str(tmp_path)))
    assert len(list(tmp_path.glob("[1-8]-*.png"))) == 8
    (edited,) = tmp_path.glob("9-edited-*.png")
    seen = scenes.look(np.asarray(Image.open(edited)))
    assert (seen.things[0].colour, seen.things[0].kind) == ("red", "boat"), seen
    with Image.open(tmp_path / "contact_sheet.png") as sheet:
        assert sheet.width > 512
    assert output.count("curl ") == 3 and "make down" in output and api in output


def test_a_load_test_finds_the_cluster_by_itself_and_tells_how_it_fared(api: str, verbs: Verbs, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "loadtest", "smoke", "--duration", "5"),
            "--run-dir",
            verbs.run_dir,
            "--out",
            tmp_path,
        ],
        **{"cwd": ROOT, "capture_output": True, "text": True, "timeout": 300},  # type: ignore[call-overload]
    )
    assert done.returncode in (0, 3), done.stdout + done.stderr  # 3: on a busy machine requests may be sent late
    (folder,) = tmp_path.iterdir()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["url"] == api and summary["outcomes"] == {"ok": summary["requests"]} and summary["images"] > 0
    assert summary["most"] == {"replicas": 1, "replicas_at_end": 1, "nodes": 1, "nodes_at_end": 1}
    assert set(summary["server"]) >= {"queue", "denoise"}
    samples = [json.loads(line) for line in (folder / "timeline.jsonl").read_text().splitlines()]
    (milestones,) = next(sample["milestones"] for sample in samples if sample.get("milestones")).values()
    assert {"process", "constructor", "weights", "warm"} <= set(milestones)
    assert any(sample.get("target") == 1 for sample in samples)
    assert any(sample.get("nodes") == {"ray_tpu": 1} for sample in samples)


def test_without_keys_whoever_comes_from_elsewhere_is_refused(api: str) -> None:
    elsewhere = Request(f"{api}/v1/models", headers={"X-Forwarded-For": "192.0.2.7"})
    with pytest.raises(HTTPError) as caught:
        urlopen(elsewhere, timeout=60)
    assert caught.value.code == 403 and "args.api_keys_file" in json.load(caught.value)["error"]["message"]


def test_with_keys_only_their_holders_are_let_in_until_the_file_changes(
    api: str, verbs: Verbs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, config = tmp_path / "keys.yaml", tmp_path / "serve_config.yaml"
    make = [sys.executable, "-m", "cluster.api_key", "--name", "alice", "--file", str(file), "--rpm", "4"]
    key = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    config.write_text(verbs.config.read_text().replace("api_keys_file: null", f"api_keys_file: {file}"))
    succeeds(verbs("deploy", "deploy", "--config", str(config), "--serve-port", str(verbs.serve_port)))
    with OpenAI(base_url=f"{api}/v1", api_key=key, max_retries=0) as client:
        stranger = client.with_options(api_key="imagine-not-a-key-of-anyone")
        for ask in (stranger.models.list, lambda: stranger.images.generate(prompt=PROMPT)):
            with pytest.raises(AuthenticationError) as unknown:
                ask()
            assert unknown.value.code == "invalid_api_key"
        assert refusal(imagine(api, prompt=PROMPT, api_key=key))[0] == 401
        assert fetch(f"{api}/healthz")[0] == fetch(f"{api}/")[0] == 200
        stream = client.images.generate(prompt=PROMPT, stream=True, partial_images=1)
        assert [event.type for event in stream][-1] == "image_generation.completed"
        assert "IMAGINE_API_KEY" in refuses(verbs("sample_images", "--out", str(tmp_path)))
        monkeypatch.setenv("IMAGINE_API_KEY", key)
        assert sample_images.generate(api, PROMPT, 7).startswith(b"\x89PNG")
        answer = client.images.generate(prompt=PROMPT, n=2)
        assert len(answer.data or []) == 2
        with pytest.raises(RateLimitError) as full:
            client.images.generate(prompt=PROMPT)
        assert full.value.code == "rate_limit_exceeded" and 1 <= int(full.value.response.headers["retry-after"]) <= 20
        file.write_text("# all are revoked\n[]\n")

        def revoked() -> bool:
            try:
                client.models.list()
            except AuthenticationError:
                return True
            except RateLimitError:  # as before
                return False
            return False

        assert soon(revoked)
    assert not found_in_logs(verbs.cluster, key), "in a log"
    arguments = ("--config", str(verbs.config), "--serve-port", str(verbs.serve_port))
    succeeds(verbs("deploy", "deploy", *arguments))


def found_in_logs(cluster: Cluster, words: str) -> list[Path]:
    logs = [path for path in cluster.temp_dir.rglob("*") if path.is_file() and "logs" in path.parts]
    return [path for path in logs if words.encode() in path.read_bytes()]


def test_no_log_has_a_prompt_whatever_became_of_its_request(api: str, verbs: Verbs) -> None:
    """Of all that the tests above have sent; in a query string the words are written otherwise."""
    prompt = "a lighthouse that nobody else may hear of"
    assert imagine(api, prompt=prompt, num_inference_steps=1)[0] == 200
    assert imagine(api, prompt=prompt, size=prompt)[0] == 400
    assert fetch(f"{api}/v1/images/generations", {"prompt": prompt, "num_inference_steps": 1})[0] == 200
    assert soon(lambda: bool(found_in_logs(verbs.cluster, "GET /imagine 400"))), "Serve's access log"
    for text in (prompt, PROMPT):
        for words in (text, text.replace(" ", "+"), text.replace(" ", "%20")):
            assert found_in_logs(verbs.cluster, words) == []


def test_the_token_stands_in_no_log_no_command_line_and_no_environment(api: str, verbs: Verbs) -> None:
    """After all that the tests above have done with it."""
    token = verbs.cluster.token_file.read_text()
    assert len(token) == 64 and found_in_logs(verbs.cluster, token) == []
    for process in verbs.cluster.search():
        with contextlib.suppress(psutil.Error):
            assert token not in " ".join(process.cmdline()) and token not in str(process.environ())
