"""Shell completion."""

from __future__ import annotations

import os
import re

import click
from click.shell_completion import (
    BashComplete,
    CompletionItem,
    FishComplete,
    add_completion_class,
    get_completion_class,
)

from utilityvm.cli import output
from utilityvm.cli.group import Command

SHELLS = ("bash", "zsh", "fish")

# click's own takes backslashes away and splits at blanks, so that no name with a blank can be completed.
_BASH = """\
%(complete_func)s() {
    local response type value
    response=$(env COMP_WORDS="$(IFS=$'\\n'; echo "${COMP_WORDS[*]}")" COMP_CWORD=$COMP_CWORD \
%(complete_var)s=bash_complete "$1")
    COMPREPLY=()
    while IFS=',' read -r type value; do
        case $type in
            dir) compopt -o dirnames ;;
            file) compopt -o default ;;
            plain) COMPREPLY+=("$value") ;;
        esac
    done <<< "$response"
}

complete -o nosort -F %(complete_func)s %(prog_name)s
"""


class _Bash(BashComplete):
    """Completes names that hold blanks, quotes and the like: bash puts into the line what it is given."""

    source_template = _BASH

    def source(self) -> str:
        return self.source_template % self.source_vars()  # click starts a bash to ask for its version first

    def format_completion(self, item: CompletionItem) -> str:
        return f"{item.type},{quoted(item.value, opened_by=_typed()[:1])}"


def _typed() -> str:
    """The word that is being completed, as it stands in the line."""
    words = os.environ.get("COMP_WORDS", "").split("\n")
    at = int(os.environ.get("COMP_CWORD", "0"))
    return words[at] if at < len(words) else ""


def quoted(value: str, *, opened_by: str) -> str:
    """`value` so that bash reads it as one word, behind the quote that was typed already, if one was."""
    if opened_by == "'":
        return value.replace("'", "'\\''")
    if opened_by == '"':
        return re.sub(r'(["$`\\])', r"\\\1", value)
    return re.sub(r"([^\w@%+=:,./-])", r"\\\1", value)


class _Fish(FishComplete):
    """Completes names that hold commas: click's own splits a line at each of them."""

    def source(self) -> str:
        return super().source().replace("(string split ", "(string split --max 1 ")


add_completion_class(_Bash)
add_completion_class(_Fish)


@click.command("completion", cls=Command, short_help="Print the completion script of a shell.")
@click.argument("shell", type=click.Choice(SHELLS))
def completion_command(shell: str) -> None:
    """Print the script that completes commands, options, VMs, templates and disks in a shell.

    \b
    bash:  echo 'eval "$(uvm completion bash)"' >> ~/.bashrc
    zsh:   echo 'eval "$(uvm completion zsh)"' >> ~/.zshrc
    fish:  uvm completion fish > ~/.config/fish/completions/uvm.fish
    """
    root = click.get_current_context().find_root()
    kind = get_completion_class(shell)
    assert kind is not None
    output.write(kind(root.command, {}, "uvm", "_UVM_COMPLETE").source())
