"""A verb of the command line: options in groups, a short and a full help, defaults from the environment and a file."""

from __future__ import annotations

import difflib
import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem

from harness.errors import UsageError
from harness.option_types import FOLDER, NEW_FILE, PATH, made, options_of
from harness.terminal import Verbosity, set_verbosity

Table = dict[str, object]
Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
SHORT = 14
"""A verb with more options than this shows only those that most people need, until asked for --help-all."""
COMMON = frozenset(
    {"base_urls", "model", "tier", "rate", "concurrency", "duration_s", "limit", "warmup", "slo", "attain", "format_",
     "out"}
)  # fmt: skip
"""Options, by the names of their parameters, that the short help of such a verb shows."""
ALWAYS = "Audit"
"""The group of options that a verb is about: all of them are in its short help."""
CONFIG = Path("harness.toml")

EXIT_STATUS = """\b
Exit status:
  0    decided: VALID, the SLO was kept and no condition fails, where there are any
  1    something failed or was skipped; the message says what, where and what to do
  2    the command line is wrong, or a file that it names
  3    INVALID: what was measured proves nothing and has no price
  4    an SLO was missed (by every load, of several), or a condition of --fail-if fails
  5    not decided: TOO SMALL (below --min-requests), or too few runs to judge
  130  stopped by Ctrl-C; a sweep and a search go on with --resume
"""

ENVIRONMENT = """\b
Environment (HARNESS_BASE_URL and the like: any option's default, as in a file harness.toml here):
  HARNESS_API_KEY  the servers' API key; never given on a command line, never written down (at --base-url
                   OPENAI_API_KEY where this is unset)
  HARNESS_CACHE    where model weights are kept (default: ~/.cache/harness)
  HARNESS_TIERS    your own tiers file, added to the shipped one; HARNESS_MODELS: of models
  HARNESS_TRACEBACK 1: show the whole of an error that nobody foresaw
  RAY_ADDRESS      use this Ray cluster instead of starting Ray on this machine
"""


def takes(kind: type[Any], *chosen: list[click.Option], to: str = "asked") -> Decorator:
    """The options of ``kind`` (or those ``chosen``), given to a verb's function as one object named ``to``."""
    options = [o for group in chosen or [options_of(kind)] for o in group]

    names = {str(o.name) for o in options}

    def apply(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **params: Any) -> Any:
            return function(
                *args, **{to: made(kind, {name: params.pop(name) for name in names & params.keys()})}, **params
            )

        for option in reversed(options):
            call.__dict__.setdefault("__click_params__", []).append(option)
        return call

    return apply


def format_option(*kinds: str) -> Decorator:
    """``--format`` with these kinds, the first of them by default."""
    return click.option(
        "--format", "format_", type=click.Choice(kinds), default=kinds[0], show_default=True, help="How to print it."
    )


def html_option(what: str) -> Decorator:
    """``--html FILE``: ``what`` as one page that stands alone."""
    what = f"Write {what} as one page that stands alone, too; an earlier one is replaced."
    return click.option("--html", type=NEW_FILE, help=what)


def out_option(default: str, what: str) -> Decorator:
    """``-o FOLDER``."""
    return click.option(
        "-o", "--output", "--out", "out", type=FOLDER, default=Path(default), show_default=True,
        help=f"Folder for {what}; never overwritten.",
    )  # fmt: skip


def resume_option(help: str) -> Decorator:  # noqa: A002 - Click's own name for it
    """``--resume`` with a folder, or without: then it is `NEWEST`."""
    return click.option("--resume", is_flag=False, flag_value=NEWEST, metavar="[FOLDER]", help=help)


NEWEST = "newest"
JSON_OPTION = format_option("text", "json")
ONE_TRACE_ARGUMENT = click.argument("trace", type=PATH)
TRACE_ARGUMENT = click.argument("trace", type=PATH, nargs=-1, required=True)
"""Files of one trace: also folders, patterns, archives, -, s3:// and hf://datasets/."""


class Verb(click.Command):
    """A command with -h, --help-all, -q and -v; its options carry the name of their ``group``."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        # Its own, not its group's: Click makes the option once, and a sweep file's options are parsed without a group.
        self.context_settings.setdefault("help_option_names", ["-h", "--help"])
        for option in _own(self):
            option.envvar = option.envvar or "HARNESS_" + _long(option).strip("-").replace("-", "_").upper()

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """The verb's own options, then those that every verb has."""
        return [*self.params, *_shared(self.is_long), *super().get_params(ctx)[len(self.params) :]]

    @property
    def is_long(self) -> bool:
        """Whether the short help leaves options out."""
        return sum(not option.hidden for option in _own(self)) > SHORT

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The options by group; of a long verb only the common ones, unless --help-all was given."""
        short = self.is_long and not ctx.meta.get("harness.help_all")
        groups: dict[str, list[tuple[str, str]]] = {}
        left_out = 0
        for param in self.get_params(ctx):
            if not isinstance(param, click.Option) or (record := param.get_help_record(ctx)) is None:
                continue
            mine = param in self.params
            own = getattr(param, "group", "Options")
            if short and mine and param.name not in COMMON and own != ALWAYS and not param.required:
                left_out += 1
                continue
            group = "Options" if short and own != ALWAYS else own if mine else "Also"
            groups.setdefault(group, []).append(record)
        for group, records in groups.items():
            with formatter.section(group):
                formatter.write_dl(records)
        if left_out:
            formatter.write_paragraph()
            formatter.write_text(f"{left_out} more options: {ctx.command_path} --help-all")

    def invoke(self, ctx: click.Context) -> Any:
        """Run the verb; with -v after saying which options do not have their shipped defaults, and why."""
        if ctx.meta.get("harness.verbosity") == Verbosity.VERBOSE:
            for option in _own(self):
                source = ctx.get_parameter_source(option.name or "")
                where = {ParameterSource.ENVIRONMENT: option.envvar, ParameterSource.DEFAULT_MAP: CONFIG}.get(source)  # type: ignore[arg-type]
                if where:
                    click.echo(f"{_long(option)} = {ctx.params.get(option.name or '')} (from {where})", err=True)
        return super().invoke(ctx)


command = functools.partial(click.command, cls=Verb)


class Group(click.Group):
    """A group of verbs."""

    command_class = Verb


class Lazy(click.Command):
    """A verb that is not imported yet: ``where`` is ``module:attribute``, the short help the verb's own."""

    def __init__(self, where: str, short_help: str) -> None:
        super().__init__(where, short_help=short_help)


class LazyGroup(Group):
    """A group whose verbs are imported one by one (as in Click's documentation); its help imports none of them."""

    def __init__(self, name: str | None = None, *, sections: Mapping[str, Mapping[str, Lazy]], **settings: Any) -> None:
        self.sections = sections
        lazy: dict[str, click.Command] = {name: verb for verbs in sections.values() for name, verb in verbs.items()}
        super().__init__(name, commands=lazy, **settings)

    def get_command(self, ctx: click.Context | None, cmd_name: str) -> click.Command | None:
        """The verb, imported now."""
        found = self.commands.get(cmd_name)
        if isinstance(found, Lazy):
            module, _, attribute = str(found.name).partition(":")
            found = self.commands[cmd_name] = getattr(import_module(module), attribute)
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """One heading with its verbs per section, their columns aligned."""
        width = max(map(len, self.commands))
        for heading, verbs in self.sections.items():
            with formatter.section(heading):
                formatter.write_dl([(f"{name:<{width}}", verb.short_help or "") for name, verb in verbs.items()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Verbs and options that begin like this, without an import."""
        verbs = sorted((name, v) for name, v in self.commands.items() if name.startswith(incomplete) and not v.hidden)
        found = [CompletionItem(name, help=verb.short_help) for name, verb in verbs]
        return found + click.Command.shell_complete(self, ctx, incomplete)


def _own(verb: click.Command) -> list[click.Option]:
    return [param for param in verb.params if isinstance(param, click.Option)]


def _long(option: click.Option) -> str:
    """``--output`` of -o and --output."""
    return max(option.opts, key=len)


def _shared(long: bool) -> Iterator[click.Option]:
    """--help-all (shown of a long verb), -q and -v."""

    def help_all(ctx: click.Context, _: click.Parameter, asked: bool) -> None:
        if asked:
            ctx.meta["harness.help_all"] = True
            click.echo(ctx.get_help())
            ctx.exit()

    def loudness(ctx: click.Context, param: click.Parameter, asked: bool) -> None:
        if asked:
            ctx.meta["harness.verbosity"] = Verbosity.QUIET if param.name == "quiet" else Verbosity.VERBOSE
            set_verbosity(ctx.meta["harness.verbosity"])

    flag = functools.partial(click.Option, is_flag=True, expose_value=False, is_eager=True)
    yield flag(["--help-all"], callback=help_all, hidden=not long, help="Show all options.")
    yield flag(["-q", "--quiet"], callback=loudness, help="Say nothing but the result and errors.")
    yield flag(["-v", "--verbose"], callback=loudness, help="Say also where options come from, and show the figures of "
               "an INVALID run and the traceback of a failure that is not explained.")  # fmt: skip


def read_defaults(group: click.Group, path: Path = CONFIG) -> Table:
    """Click's ``default_map`` of a group from a file.

    A table named as a verb holds options of that verb, without their dashes; a key above all tables holds for every
    verb that has such an option. Raises `UsageError` with the file and the key that no option has.
    """
    if not path.exists():
        return {}
    from harness.untrusted import read_toml

    tables = read_toml(path)
    shared = {key: value for key, value in tables.items() if not isinstance(value, dict)}
    known: set[str] = set()
    found = _map(group, "", shared, {key: value for key, value in tables.items() if key not in shared}, path, known)
    _check(path, shared, known, "no verb has such an option")
    return found


def _map(verb: click.Command, name: str, shared: Table, own: object, path: Path, known: set[str]) -> Table:
    """Of a verb, or of a group of them; ``known`` takes in what its options are called."""
    if not isinstance(own, dict):
        raise UsageError(f"{path}: {name}: is the name of a verb, so it begins a table: [{name}]")
    if isinstance(verb, click.Group):
        _check(path, own, verb.commands, "no such verb")
        inner = {key: verb.get_command(None, key) for key in verb.commands}  # type: ignore[arg-type]
        return {key: _map(one, key, shared, own.get(key, {}), path, known) for key, one in inner.items() if one}
    options = {word[2:]: o for o in _own(verb) for word in o.opts if word.startswith("--")}
    known.update(options)
    _check(path, own, options, f"harness {name} has no such option")
    chosen = {_key(key): value for key, value in [*shared.items(), *own.items()] if _key(key) in options}
    try:
        return {options[key].name or "": as_default(options[key], value) for key, value in chosen.items()}
    except ValueError as e:
        raise UsageError(f"{path}: {e}") from None


def as_default(option: click.Option, value: object, folder: Path = Path()) -> object:
    """A value of a TOML file as Click takes a default: words are parsed by the option's own type, paths count from
    ``folder``. Raises ValueError, and TypeError for what JSON does not have.
    """
    if option.is_flag:
        if not isinstance(value, bool):
            raise ValueError("is true or false")
        return value
    if isinstance(value, list) and option.multiple:
        return [str(one) for one in value]
    if isinstance(value, bool | list):
        raise ValueError(f"{json.dumps(value)} is not what {_long(option)} takes")
    if isinstance(value, dict):
        limits = ",".join(f"{key}={limit}" for key, limit in value.items())
        value = limits if option.name == "slo" else json.dumps(value, allow_nan=False)
    text = str(folder / Path(str(value)).expanduser()) if isinstance(option.type, click.Path) else str(value)
    return [text] if option.multiple else text


def _key(word: str) -> str:
    return word.replace("_", "-")


def _check(path: Path, keys: Iterable[str], known: Iterable[str], problem: str) -> None:
    for key in keys:
        if _key(key) not in known:
            near = difflib.get_close_matches(_key(key), known, n=1, cutoff=0.5)
            raise UsageError(f"{path}: {key}: {problem}{f'; did you mean {near[0]}?' if near else ''}")
