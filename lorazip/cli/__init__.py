"""The command line: one file a command, each a thin skin over one library call.

Exit codes: 0 ok, 1 a check failed, 2 usage or bad input, 3 could not decide. Results go to stdout, all else to stderr.
"""

from __future__ import annotations

import os
import sys

import click

from lorazip import __version__
from lorazip.cli.add import add
from lorazip.cli.bench import bench
from lorazip.cli.compress import compress
from lorazip.cli.eval import evaluate
from lorazip.cli.export import export
from lorazip.cli.info import info
from lorazip.cli.inspect import inspect
from lorazip.cli.remove import remove
from lorazip.cli.transfer import transfer
from lorazip.cli.verify import verify
from lorazip.errors import LorazipError, printable


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Example: lorazip compress adapters/ -o team.lorazip",
)
@click.version_option(__version__, package_name="lorazip")
def group() -> None:
    """Compress many LoRA adapters of one base model into one verified bundle, evaluate it, get them back."""


for command in (inspect, compress, info, verify, export, add, remove, evaluate, bench, transfer):
    group.add_command(command)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; errors that a user is meant to read become one message and an exit code."""
    try:
        code = group.main(args=arguments, prog_name="lorazip", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except LorazipError as error:
        for line in str(error).split("\n"):
            click.echo(f"error: {printable(line)}", err=True)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort:
        click.echo(
            "interrupted (compress goes on with --resume, eval and transfer where they stopped when run again)",
            err=True,
        )
        sys.exit(130)
    except OSError as error:
        # Of a kind that nobody foresaw; what is being written is whole or not there all the same.
        click.echo(f"error: {printable(str(error))}", err=True)
        sys.exit(2)
    except Exception as error:
        # A fault of ours, or an input that nobody foresaw: the last net, so that a job's log has one line to act on.
        if os.environ.get("LORAZIP_TRACEBACK"):
            raise
        text = printable(f"{type(error).__name__}: {error}")
        click.echo(f"error: {text} (not foreseen: please report it with LORAZIP_TRACEBACK=1 set)", err=True)
        sys.exit(2)
