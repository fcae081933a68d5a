"""The command line: one group; each file of this package holds the options and help of a few verbs.

What a verb does is in `harness.commands`, imported when the verb runs.
"""

from __future__ import annotations

import io
import os
import resource
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType

import click

from harness import __version__
from harness.cli import capacity, catalogue, cloud, decide, processes, results, runs, sweep, trace
from harness.cli.options import ENVIRONMENT, EXIT_STATUS
from harness.cli.verb import Group, command, read_defaults
from harness.errors import EXIT_FAILURE, EXIT_VALID, HarnessError, sentence, unknown_name
from harness.startup import forgo_pandas
from harness.terminal import cut, guard_streams, hung_up
from harness.verbosity import Verbosity, verbosity

SECTIONS: dict[str, tuple[click.Command, ...]] = {
    "Replay": (runs.replay, runs.plan, runs.serve, runs.run, sweep.sweep),
    "Results": (results.report, results.open_, results.export, decide.compare),
    "Decisions": (capacity.capacity, capacity.plan_fleet, decide.price),
    "Traces, tiers, models": (trace.trace, catalogue.tiers, catalogue.models),
    "Machines": (catalogue.doctor, processes.ps, processes.stop, cloud.cluster, runs.calibrate),
}
"""The verbs in the order a newcomer meets them."""


class Sections(Group):
    """A group whose help lists the verbs by `SECTIONS`."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """One heading with its verbs per section, their columns aligned."""
        width = max(len(name) for name in self.commands)
        for heading, verbs in SECTIONS.items():
            with formatter.section(heading):
                formatter.write_dl([(f"{verb.name:<{width}}", verb.get_short_help_str(80)) for verb in verbs])


@click.group(
    cls=Sections,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    help="""Replay a production trace against LLM servers and learn what a million tokens costs.

    \b
    The whole job:        harness replay trace.jsonl
    Against your server:  harness replay trace.jsonl --base-url http://host:8000/v1 --model NAME
    Step by step:         harness plan -> harness serve -> harness run -> harness report

    Every step reads and writes files, so each can be repeated and looked at on its own. Data goes to stdout, words to
    stderr. Every verb that prints figures takes --format json.
    """,
    epilog=f"{EXIT_STATUS}\n{ENVIRONMENT}",
)
@click.version_option(__version__, "-V", "--version", prog_name="harness")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """The group of all verbs."""
    ctx.default_map = read_defaults(cli)


@command(name="help", short_help="Show the help of a verb.", hidden=True)
@click.argument("verb", nargs=-1)
@click.pass_context
def help_(ctx: click.Context, verb: Sequence[str]) -> int:
    """Show the help of VERB, all of its options, or of the harness."""
    found: click.Command = cli
    parent = ctx.find_root()
    for name in verb:
        below = found.commands if isinstance(found, click.Group) else {}
        if name not in below:
            raise unknown_name("verb", " ".join(verb), below or cli.commands)
        found = below[name]
        parent = click.Context(found, info_name=name, parent=parent)
    parent.meta["harness.help_all"] = True
    click.echo(found.get_help(parent))
    return EXIT_VALID


cli.add_command(help_)
for _verbs in SECTIONS.values():
    for _verb in _verbs:
        cli.add_command(_verb)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point: run a verb and end with its exit status. Whatever goes wrong is a sentence on standard error."""
    guard_streams()
    if resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
        # OpenBLAS takes memory for every processor, and where there is none it aborts or tries again for ever.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    forgo_pandas()
    # These unwind like Ctrl-C, so that everything started is ended in order.
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, _interrupt)
    try:
        code = cli.main(args=list(argv) if argv is not None else None, prog_name="harness", standalone_mode=False)
        sys.stdout.flush()
    except click.ClickException as e:
        shown = io.StringIO()
        e.show(shown)
        _tell(shown.getvalue().rstrip())
        code = e.exit_code
    except HarnessError as e:
        _tell(f"harness: {e}")
        code = e.exit_code
    except (click.Abort, KeyboardInterrupt):
        _tell("harness: stopped")
        code = 130
    except BrokenPipeError:
        # The reader of our stdout went away (`| head`): nothing to tell anyone; keep the interpreter from trying again.
        sys.stderr.close()
        code = EXIT_VALID
    except Exception as e:
        if os.environ.get("HARNESS_TRACEBACK") or verbosity() is Verbosity.VERBOSE:
            raise
        _tell(f"harness: {sentence(e)}")
        code = EXIT_FAILURE
    sys.exit(code or EXIT_VALID)


def _interrupt(number: int, frame: FrameType | None) -> None:
    if number == signal.SIGHUP:
        hung_up()
    signal.default_int_handler(number, frame)


def _tell(words: str) -> None:
    with suppress(OSError, ValueError):  # nobody can be told
        print(cut(words), file=sys.stderr, flush=True)
