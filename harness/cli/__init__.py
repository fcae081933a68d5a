"""The command line: one group of verbs. A module of this package holds the options, the help and the body of a few
verbs and is imported when one of them is run or its help is asked for; `harness.cli.runner` is what they share.
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

from harness import __version__, forgo_pandas
from harness.cli.verb import ENVIRONMENT, EXIT_STATUS, Lazy, LazyGroup, Verb, command, read_defaults
from harness.errors import EXIT_FAILURE, EXIT_VALID, HarnessError, sentence
from harness.terminal import Verbosity, cut, guard_streams, hung_up, verbosity

SECTIONS: dict[str, dict[str, Lazy]] = {
    "Replay": {
        "replay": Lazy("harness.cli.replay:replay", "Plan, serve, run and report in one go."),
        "simulate": Lazy(
            "harness.cli.simulate:simulate",
            "Replay in virtual time on hardware that is not there: figures are simulated.",
        ),
        "plan": Lazy("harness.cli.replay:plan", "Turn a trace into a plan file: requests, prompts, times."),
        "serve": Lazy("harness.cli.replay:serve", "Start servers and keep them until Ctrl-C."),
        "run": Lazy("harness.cli.replay:run", "Send a plan and report."),
        "sweep": Lazy("harness.cli.sweep:sweep", "Models x tiers x load levels x repeats on one trace."),
    },
    "Results": {
        "report": Lazy("harness.cli.results:report", "Report on a run directory; compare several in a page."),
        "open": Lazy("harness.cli.results:open_", "Show a folder of runs in the browser."),
        "export": Lazy("harness.cli.results:export", "Write result rows as Parquet, CSV or JSON."),
        "sql": Lazy("harness.cli.sql:sql", "Ask runs in SQL: requests, figures, what servers and workers saw."),
        "compare": Lazy(
            "harness.cli.results:compare",
            "A against B: paired intervals and a plain verdict; fails a CI job on request.",
        ),
    },
    "Decisions": {
        "advise": Lazy(
            "harness.cli.advise:advise", "Rank tiers that nobody has rented yet by cost at an SLO: simulated."
        ),
        "calibrate-model": Lazy(
            "harness.cli.calibrate_model:calibrate_model", "Fit what a step takes to own runs, for simulations."
        ),
        "capacity": Lazy("harness.cli.capacity:capacity", "Find the highest load that keeps an SLO, in few runs."),
        "plan-fleet": Lazy(
            "harness.cli.plan_fleet:plan_fleet", "How many instances, of which tier, carry a demand at an SLO."
        ),
        "audit": Lazy(
            "harness.cli.audit:audit",
            "Can a smaller, quantised or distilled model do the same work, and what does an accepted answer cost then?",
        ),
        "price": Lazy("harness.cli.price:price", "What to charge: cost, margin, utilisation, against API list prices."),
    },
    "Traces, tiers, models": {
        "trace": Lazy("harness.cli.trace:trace", "Look at a trace, convert, sample, make up or anonymize one."),
        "tiers": Lazy("harness.cli.catalogue:tiers", "List hardware tiers and their prices, or read today's."),
        "models": Lazy("harness.cli.catalogue:models", "List models, or fetch the weights of one."),
        "quantise": Lazy("harness.cli.quantise:quantise", "Write a model with weights of 8 or 4 bits, for an audit."),
    },
    "Machines": {
        "doctor": Lazy("harness.cli.machines:doctor", "Say what this machine can and cannot run, and why."),
        "completion": Lazy("harness.cli.completion:completion", "Print the script that completes commands in a shell."),
        "ps": Lazy("harness.cli.machines:ps", "List the servers, load workers and Ray that are running."),
        "stop": Lazy("harness.cli.machines:stop", "End what 'harness ps' lists, one by its ID or all."),
        "cluster": Lazy("harness.cli.catalogue:cluster", "Rent, watch and end a Ray cluster on AWS."),
        "bundle": Lazy("harness.cli.bundle:bundle", "Write all that a host without a network lacks, in parts."),
        "calibrate": Lazy(
            "harness.cli.machines:calibrate", "Measure what the load generator can carry on this machine."
        ),
    },
}


@click.group(
    cls=LazyGroup,
    sections=SECTIONS,
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
    whole = bool(verb) and isinstance(cli.get_command(ctx, verb[0]), Verb)
    cli.main([*verb, "--help-all" if whole else "--help"], ctx.find_root().info_name, standalone_mode=False)
    return EXIT_VALID


cli.add_command(help_)


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
