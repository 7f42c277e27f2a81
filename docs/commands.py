"""Prints docs/COMMANDS.md, the help of every command.

.venv/bin/python docs/commands.py > docs/COMMANDS.md
"""

from __future__ import annotations

from collections.abc import Iterator

import click

from lorazip.cli import group

WIDTH = 100
HEAD = """# Commands

The help of every command, made by `.venv/bin/python docs/commands.py > docs/COMMANDS.md`; a test checks that it is
current. What the commands are for, with examples that run: [README.md](../README.md).
"""


def reference() -> str:
    """The page: the group's help, then each command's, as `--help` prints it on a wide terminal."""
    top = click.Context(group, info_name="lorazip", terminal_width=WIDTH, **group.context_settings)
    parts = [HEAD]
    for title, text in [("lorazip", group.get_help(top)), *_helps(group, top, "lorazip")]:
        parts.append(f"## {title}\n\n```text\n{text.rstrip()}\n```\n")
    return "\n".join(parts)


def _helps(parent: click.Group, top: click.Context, path: str) -> Iterator[tuple[str, str]]:
    """Title and help of every command below, groups before their commands."""
    for name, command in parent.commands.items():
        context = click.Context(
            command, parent=top, info_name=name, terminal_width=WIDTH, **command.context_settings
        )
        yield f"{path} {name}", command.get_help(context)
        if isinstance(command, click.Group):
            yield from _helps(command, context, f"{path} {name}")


if __name__ == "__main__":
    print(reference(), end="")
