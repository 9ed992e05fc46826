"""Ray's command line for a remote cluster, which repeats what Google was too busy for and reports errors in one line.

`python -m cluster.remote.launcher up cluster.yaml` is `ray up cluster.yaml`. Without this module, a refusal of Google's
ends with a traceback through Ray, and a single 503 ends `ray down` while machines still run.
"""

import sys

import click

from app.ray_internals.google import retry_reads_and_deletes, sentence
from cluster.cli import UserError, run_command


def run(arguments: list[str]) -> int:
    from ray.scripts.scripts import cli

    retry_reads_and_deletes()
    try:
        cli.main(arguments, prog_name="ray", standalone_mode=False)
    except click.Abort:
        raise KeyboardInterrupt from None
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except Exception as error:
        if reason := sentence(error):
            raise UserError(reason) from None
        raise
    return 0


if __name__ == "__main__":
    run_command(lambda: run(sys.argv[1:]))
