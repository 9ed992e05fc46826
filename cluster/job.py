"""Submits, follows, lists and stops jobs through Ray's Jobs API. Knows nothing of what a job does.

A job is a module of jobs/. Its entrypoint runs on the head, with the code of this checkout. Relative paths of a job
start at the repository on the cluster: this folder for the local cluster, ~/imagine on a remote head.
"""

import asyncio
import json
import logging
import os
import secrets
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp

from cluster import ROOT
from cluster.cli import Parser, UserError, run_command
from cluster.connection import LOCAL, dashboard_of, isolate
from cluster.dashboard import Dashboard, reason
from cluster.local.state import RUN_DIR
from cluster.terminal import Progress, format_duration, make_command, say

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

HOME_ELSEWHERE = "~/imagine"  # where the cluster files' file_mounts put the repository
DEMO_JOBS = {"train_demo": "demo.train", "demo_quality": "demo.quality"}
TRAVELS = ("app", "benchmarks", "capacity", "cluster", "configs", "demo", "jobs", "requirements", "serve_config.yaml")
POLL_S = 0.5
STOP_S = 20  # from Ctrl-C until Ray kills the job
CONNECTION_LOGGERS = ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk")  # a line per connection
OVER = ("SUCCEEDED", "FAILED", "STOPPED")


def submit(dashboard: Dashboard, name: str, arguments: list[str], resources: dict[str, float]) -> str:
    """Returns the submission id."""
    elsewhere = dashboard.cluster != LOCAL
    environment = {
        "IMAGINE_HOME": HOME_ELSEWHERE if elsewhere else str(ROOT),
        "PYTHONUNBUFFERED": "1",  # shows progress at once
        "RAY_COLOR_PREFIX": "0",  # a log file has no colours
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",  # it advises to install PyTorch
        "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_S),
    }
    try:
        return client(dashboard).submit_job(
            entrypoint=shlex.join(["python", "-m", modules()[name], *arguments]),
            submission_id=f"{name}-{secrets.token_hex(3)}",
            runtime_env={**(packed() if elsewhere else in_place()), "env_vars": environment},
            metadata={"job": name},
            entrypoint_resources=resources or None,
        )
    except (RuntimeError, ValueError, ConnectionError) as error:
        raise UserError(f"The {dashboard.name} does not take the job. {reason(str(error))}") from None


def packed() -> dict[str, Any]:
    return {
        "working_dir": str(ROOT),
        "excludes": [f"/{entry.name}" for entry in ROOT.iterdir() if entry.name not in TRAVELS],
    }


def in_place() -> dict[str, Any]:
    """A local job runs in this folder. The nodes of the local cluster share Ray's folder of unpacked code, and each new
    node unpacks there again while others run from it."""
    return {"working_dir": f"local://{ROOT}"}


def follow(dashboard: Dashboard, job: str) -> int:
    """Prints the job's output until it ends, and returns its exit status. Ctrl-C stops the job."""
    say(f"Following {job}. Ctrl-C stops it. If this terminal goes, the job goes on, and to follow it again:")
    say(f"  {make_command(f'job ID={job}', dashboard.cluster)}")
    try:
        info = wait_for_start(dashboard, job)
        asyncio.run(print_log(dashboard, job))
        while (info := details(dashboard, job)).status not in OVER:
            time.sleep(POLL_S)
    except KeyboardInterrupt:
        say(f"Stopping {job}, which has {STOP_S} s to end. Ctrl-C again leaves it to that.")
        stop(dashboard, job)
        return 130
    return outcome(job, info)


def wait_for_start(dashboard: Dashboard, job: str) -> "JobDetails":
    with Progress() as progress:
        while (info := details(dashboard, job)).status == "PENDING":
            progress.show({job: ("pending", (info.message or "").partition("\n")[0])})
            time.sleep(POLL_S)
    return info


async def print_log(dashboard: Dashboard, job: str) -> None:
    """Prints the job's log as it grows. Connects again if the connection breaks while the job runs."""
    printed = 0
    while True:
        position = 0
        try:
            async for text in client(dashboard).tail_job_logs(job):  # always from the start of the log
                if position + len(text) > printed:
                    sys.stdout.write(text[max(0, printed - position) :])
                    sys.stdout.flush()
                    printed = position + len(text)
                position += len(text)
            return
        except (RuntimeError, OSError, aiohttp.ClientError) as error:
            if details(dashboard, job).status in OVER:
                return
            say(f"The connection to the log broke ({reason(str(error))}). Connecting again.")
            await asyncio.sleep(POLL_S)


def outcome(job: str, info: "JobDetails") -> int:
    took = format_duration(((info.end_time or 0) - (info.start_time or 0)) / 1000)
    if info.status == "SUCCEEDED":
        say(f"{job} has succeeded after {took}.")
        return 0
    status = info.driver_exit_code
    why = (
        "" if status else f" {reason(info.message or 'It does not say why.')}"
    )  # otherwise its log has printed the reason
    say(f"{job} {'was stopped' if info.status == 'STOPPED' else 'has failed'} after {took}.{why}")
    return status or 1


def stop(dashboard: Dashboard, job: str) -> None:
    if details(dashboard, job).status in OVER:
        say(f"{job} had ended already.")
        return
    client(dashboard).stop_job(job)
    with Progress() as progress:
        while (info := details(dashboard, job)).status not in OVER:
            progress.show({job: ("stopping", "")})
            time.sleep(POLL_S)
    say(f"{job} {'is stopped' if info.status == 'STOPPED' else 'ended by itself: ' + info.status.lower()}.")


def listing(dashboard: Dashboard) -> None:
    jobs = [job for job in client(dashboard).list_jobs() if job.submission_id]
    if not jobs:
        say(f"No job has run here yet. Submit one with: {make_command('job JOB=...', dashboard.cluster)}")
    for job in sorted(jobs, key=lambda job: job.start_time or 0):
        began = (job.start_time or 0) / 1000
        took = format_duration((job.end_time or 1000 * time.time()) / 1000 - began)
        status = f" (exit {job.driver_exit_code})" if job.driver_exit_code else ""
        when = time.strftime("%d %b %X", time.localtime(began))
        say(f"{job.submission_id:<24}  {when}  {took:>12}  {job.status.lower()}{status}  {shown(job.entrypoint)}")


def shown(entrypoint: str) -> str:
    """The job's name and arguments."""
    module, _, arguments = entrypoint.removeprefix("python -m ").partition(" ")
    names = {module: name for name, module in modules().items()}
    return f"{names.get(module, module)} {arguments}"


def details(dashboard: Dashboard, job: str) -> "JobDetails":
    if not job:
        raise UserError(f"ID must name a job. See: {make_command('jobs', dashboard.cluster)}")
    try:
        return client(dashboard).get_job_info(job)
    except (RuntimeError, OSError) as error:
        if "status code 404" not in str(error):
            raise UserError(f"The {dashboard.name} gives no details of {job}. {reason(str(error))}") from None
    raise UserError(f"There is no job {job}. See: {make_command('jobs', dashboard.cluster)}")


def client(dashboard: Dashboard) -> "JobSubmissionClient":
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient  # takes seconds to import

    from app.ray_internals.core import UPLOAD_LOGGERS

    for name in (*CONNECTION_LOGGERS, *UPLOAD_LOGGERS):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        return JobSubmissionClient(dashboard.address, headers=dict(dashboard.headers))
    except AuthenticationError:
        raise dashboard.refused("401 or 403") from None
    except (RuntimeError, ConnectionError) as error:
        raise UserError(f"The {dashboard.name} does not answer: {reason(str(error))}") from None


def modules() -> dict[str, str]:
    """Maps a job's name to its module: all of jobs/ that have a `main`, and those that make the bundled model."""
    files = [file for file in (ROOT / "jobs").glob("*.py") if "\ndef main(" in file.read_text()]
    return {file.stem: f"jobs.{file.stem}" for file in sorted(files)} | DEMO_JOBS


def check_name(name: str) -> None:
    if name not in modules():
        raise UserError(f"JOB must be one of {', '.join(sorted(modules()))}, got {name or 'nothing'}.")


def words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"ARGS must be written as for a shell: {error}, got {text}") from None


def amounts(text: str) -> dict[str, float]:
    """Resources of the job's entrypoint, such as {"TPU": 4}. Without any, it runs on the head."""
    try:
        resources: Any = json.loads(text or "{}")
    except ValueError:
        resources = None
    if not isinstance(resources, dict) or not all(type(x) in (int, float) and x > 0 for x in resources.values()):
        raise UserError(f"""RESOURCES must be JSON such as '{{"TPU": 4}}', got {text}.""")
    return {str(name): float(amount) for name, amount in resources.items()}


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("verb", choices=["run", "list", "stop"])
    parser.add_argument("--job", default="", help=f"run: one of {', '.join(sorted(modules()))}")
    parser.add_argument("--arguments", default="", help="run: the arguments of the job, quoted as for a shell")
    parser.add_argument("--resources", default="", help='run: resources of its entrypoint, as JSON: {"TPU": 4}')
    parser.add_argument(
        "--id", default="", help="run: the job to follow instead of submitting one; stop: the job to stop"
    )
    parser.add_argument("--cluster", default=LOCAL, help="local, or a file for `ray up`")
    parser.add_argument("--run-dir", type=Path, default=RUN_DIR)
    arguments = parser.parse_args()
    job_arguments = words(arguments.arguments)
    if arguments.verb == "run" and not arguments.id:
        check_name(arguments.job)
        if {"-h", "--help"} & set(job_arguments):  # needs no cluster
            os.execv(sys.executable, [sys.executable, "-m", modules()[arguments.job], *job_arguments])
    resources = amounts(arguments.resources)
    run_dir = arguments.run_dir.resolve()
    isolate(arguments.cluster, run_dir)
    with dashboard_of(arguments.cluster, run_dir) as dashboard:
        match arguments.verb:
            case "list":
                listing(dashboard)
            case "stop":
                stop(dashboard, arguments.id)
            case "run":
                return follow(dashboard, arguments.id or submit(dashboard, arguments.job, job_arguments, resources))
    return 0


if __name__ == "__main__":
    run_command(main)
