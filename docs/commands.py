"""Prints docs/COMMANDS.md, the help of every command.

.venv/bin/python docs/commands.py > docs/COMMANDS.md
"""

from __future__ import annotations

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
    sections = [("lorazip", group.get_help(top))]
    for name, command in group.commands.items():
        context = click.Context(
            command, parent=top, info_name=name, terminal_width=WIDTH, **command.context_settings
        )
        sections.append((f"lorazip {name}", command.get_help(context)))
    parts = [HEAD, *(f"## {title}\n\n```text\n{text.rstrip()}\n```\n" for title, text in sections)]
    return "\n".join(parts)


if __name__ == "__main__":
    print(reference(), end="")
