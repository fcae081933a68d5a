"""The shell's part of completion. What is completed is Click's business: it asks `harness` itself."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from harness.cli.verb import command
from harness.errors import EXIT_VALID

SHELLS = ("bash", "zsh", "fish")
VARIABLE = "_HARNESS_COMPLETE"


@command(
    epilog="""\b
Examples:
  eval "$(harness completion bash)"                       in ~/.bashrc
  eval "$(harness completion zsh)"                        in ~/.zshrc
  harness completion fish > ~/.config/fish/completions/harness.fish""",
)
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> int:
    """Print the script that completes verbs, options and their values in a shell.

    Of a system's or a user's package bash and fish find it by themselves, and zsh where its path of functions has the
    package's share/zsh/site-functions.
    """
    print(script(shell), end="")
    return EXIT_VALID


def script(shell: str) -> str:
    """Click's own script for ``shell``."""
    kind = get_completion_class(shell)
    assert kind is not None
    made = kind(click.Command("harness"), {}, "harness", VARIABLE)
    return (made.source_template % made.source_vars()).strip() + "\n"
