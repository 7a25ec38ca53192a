"""Shell completion."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from utilityvm.cli import output
from utilityvm.cli.group import Command

SHELLS = ("bash", "zsh", "fish")


@click.command("completion", cls=Command)
@click.argument("shell", type=click.Choice(SHELLS))
def completion_command(shell: str) -> None:
    """Print the script that completes uvm's commands, VMs and disks in a shell.

    \b
    bash:  echo 'eval "$(uvm completion bash)"' >> ~/.bashrc
    zsh:   echo 'eval "$(uvm completion zsh)"' >> ~/.zshrc
    fish:  uvm completion fish > ~/.config/fish/completions/uvm.fish
    """
    root = click.get_current_context().find_root()
    kind = get_completion_class(shell)
    assert kind is not None
    output.write(kind(root.command, {}, "uvm", "_UVM_COMPLETE").source())
