"""A verb of the command line: options in groups, a short and a full help, defaults from the environment and a file."""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem

from harness.errors import UsageError
from harness.terminal import Verbosity, set_verbosity

Table = dict[str, object]
"""Of a TOML file, before its types are checked."""
SHORT = 14
"""A verb with more options than this shows only those that most people need, until asked for --help-all."""
COMMON = frozenset(
    {"base_urls", "model", "tier", "rate", "concurrency", "duration_s", "limit", "warmup", "slo", "attain", "format_",
     "out"}
)  # fmt: skip
"""Options, by the names of their parameters, that the short help of such a verb shows."""
CONFIG = Path("harness.toml")
"""Defaults of options, in the folder where the harness is started."""
CONFIG_BYTES = 1 << 20


class Verb(click.Command):
    """A command with -h, --help-all, -q and -v; its options carry the name of their ``group``."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        # Its own, not its group's: Click makes the option once, and a sweep file's options are parsed without a group.
        self.context_settings.setdefault("help_option_names", ["-h", "--help"])

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """The verb's own options, then those that every verb has."""
        return [*self.params, *_shared(self.is_long), *super().get_params(ctx)[len(self.params) :]]

    @property
    def is_long(self) -> bool:
        """Whether the short help leaves options out."""
        return sum(isinstance(p, click.Option) and not p.hidden for p in self.params) > SHORT

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The options by group; of a long verb only the common ones, unless --help-all was given."""
        short = self.is_long and not ctx.meta.get("harness.help_all")
        groups: dict[str, list[tuple[str, str]]] = {}
        left_out = 0
        for param in self.get_params(ctx):
            if not isinstance(param, click.Option) or (record := param.get_help_record(ctx)) is None:
                continue
            mine = param in self.params
            if short and mine and param.name not in COMMON:
                left_out += 1
                continue
            group = "Options" if short else getattr(param, "group", "Options") if mine else "Also"
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
            for words in _sources(ctx):
                click.echo(words, err=True)
        return super().invoke(ctx)


command = partial(click.command, cls=Verb)
"""Decorator of a verb."""


class Group(click.Group):
    """A group of verbs."""

    command_class = Verb


@dataclass(frozen=True, slots=True)
class Lazy:
    """A verb that is not imported yet."""

    where: str
    """``module:attribute``."""
    short_help: str
    """The command's own, so that a list of verbs imports none of them."""


class LazyVerbs(MutableMapping[str, click.Command]):
    """Verbs by name, each imported when it is looked up: when it is run, or its own help or completion is asked for."""

    def __init__(self, verbs: Mapping[str, Lazy]) -> None:
        self._verbs: dict[str, Lazy | click.Command] = dict(verbs)

    def __getitem__(self, name: str) -> click.Command:
        verb = self._verbs[name]
        if isinstance(verb, Lazy):
            module, _, attribute = verb.where.partition(":")
            verb = self._verbs[name] = getattr(import_module(module), attribute)
        return verb

    def __setitem__(self, name: str, verb: click.Command) -> None:
        self._verbs[name] = verb

    def __delitem__(self, name: str) -> None:
        del self._verbs[name]

    def __contains__(self, name: object) -> bool:
        return name in self._verbs

    def __iter__(self) -> Iterator[str]:
        return iter(self._verbs)

    def __len__(self) -> int:
        return len(self._verbs)


class LazyGroup(Group):
    """A group whose verbs are imported one by one, and whose help lists them by section without any of them.

    Like "Lazily Loading Subcommands" in Click's documentation, but in `commands` itself: Click finds near names there.
    """

    def __init__(self, name: str | None = None, *, sections: Mapping[str, Mapping[str, Lazy]], **settings: Any) -> None:
        self.sections = sections
        """Heading -> name -> verb, in the order of the help."""
        self._lazy = {name: verb for verbs in sections.values() for name, verb in verbs.items()}
        super().__init__(name, commands=LazyVerbs(self._lazy), **settings)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """One heading with its verbs per section, their columns aligned."""
        width = max(map(len, self.commands))
        for heading, verbs in self.sections.items():
            with formatter.section(heading):
                formatter.write_dl([(f"{name:<{width}}", verb.short_help) for name, verb in verbs.items()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Verbs and options that begin like this."""
        verbs = sorted(name for name in self._lazy if name.startswith(incomplete))
        found = [CompletionItem(name, help=self._lazy[name].short_help) for name in verbs]
        return found + click.Command.shell_complete(self, ctx, incomplete)


def _sources(ctx: click.Context) -> Iterator[str]:
    """Options that the environment or the file gave, each with its value."""
    for param in ctx.command.params:
        if param.name and ctx.get_parameter_source(param.name) == ParameterSource.DEFAULT_MAP:
            variable = _variable(max(param.opts, key=len))
            where = variable if variable in os.environ else CONFIG
            yield f"{max(param.opts, key=len)} = {ctx.params.get(param.name)} (from {where})"


def _shared(long: bool) -> list[click.Option]:
    """--help-all (of a long verb), -q and -v."""

    def help_all(ctx: click.Context, _: click.Parameter, asked: bool) -> None:
        if asked:
            ctx.meta["harness.help_all"] = True
            click.echo(ctx.get_help())
            ctx.exit()

    def loudness(ctx: click.Context, param: click.Parameter, asked: bool) -> None:
        if asked:
            ctx.meta["harness.verbosity"] = Verbosity.QUIET if param.name == "quiet" else Verbosity.VERBOSE
            set_verbosity(ctx.meta["harness.verbosity"])

    flag = partial(click.Option, is_flag=True, expose_value=False)
    shared = [
        flag(["-q", "--quiet"], is_eager=True, callback=loudness, help="Say nothing but the result and errors."),
        flag(["-v", "--verbose"], is_eager=True, callback=loudness, help="Say also where options come from, and show "
             "the figures of an INVALID run and the traceback of a failure that is not explained."),
    ]  # fmt: skip
    full = flag(["--help-all"], is_eager=True, callback=help_all, help="Show all options.")
    return [full, *shared] if long else shared


def read_defaults(
    group: click.Group, path: Path = CONFIG, environment: Mapping[str, str] = os.environ, *, verb: str | None = None
) -> Table:
    """Click's ``default_map`` of a group: defaults from a file, and over them those of the environment; of all verbs,
    or of ``verb`` and those that have a table in the file, which imports no other.

    In the file a table named as a verb holds options of that verb, without their dashes; a key above all tables holds
    for every verb that has such an option, and so does a variable like HARNESS_BASE_URL. Raises `UsageError` with the
    file and the key that no option has.
    """
    tables = _read_toml(path)
    shared = {key: value for key, value in tables.items() if not isinstance(value, dict)}
    own = {key: value for key, value in tables.items() if isinstance(value, dict)}
    for name in own:
        _check(path, name, group.commands, "no such verb")
    verbs = {name: group.commands[name] for name in group.commands if verb is None or name == verb or name in own}
    known = _options(verbs)
    for key in shared:
        if _key(key) not in known:
            known = _options(group.commands)
        _check(path, key, known, "no verb has such an option")
    said = {name: environment[_variable(name)] for name in known if environment.get(_variable(name))}
    return _map(verbs, shared, own, said, path)


def _read_toml(path: Path) -> Table:
    try:
        with path.open("rb") as file:
            raw = file.read(CONFIG_BYTES + 1)
    except FileNotFoundError:
        return {}
    except OSError as e:
        raise UsageError(f"{path}: cannot be read ({e.strerror})") from e
    if len(raw) > CONFIG_BYTES:
        raise UsageError(f"{path}: larger than {CONFIG_BYTES >> 20} MiB, which is not a file of options")
    try:
        return tomllib.loads(raw.decode())
    except (ValueError, RecursionError) as e:
        raise UsageError(f"{path}: not TOML: {str(e) or 'nested too deeply'}") from e


def _map(
    verbs: Mapping[str, click.Command], shared: Mapping[str, object], own: Mapping[str, object],
    said: Mapping[str, str], path: Path,
) -> Table:  # fmt: skip
    for name in own:
        _check(path, name, verbs, "no such verb")
    found: Table = {}
    for name, verb in verbs.items():
        values = own.get(name, {})
        if not isinstance(values, dict):
            raise UsageError(f"{path}: {name}: is the name of a verb, so it begins a table: [{name}]")
        if isinstance(verb, click.Group):
            found[name] = _map(verb.commands, shared, values, said, path)
            continue
        names = _names(verb)
        for key in values:
            _check(path, key, names, f"harness {name} has no such option")
        chosen = {_key(key): value for key, value in [*shared.items(), *values.items(), *said.items()]}
        found[name] = {names[key]: _value(verb, names[key], value) for key, value in chosen.items() if key in names}
    return found


def _variable(option: str) -> str:
    return "HARNESS_" + option.strip("-").replace("-", "_").upper()


def _value(verb: click.Command, name: str, value: object) -> object:
    """A TOML value as Click takes a default: words are parsed by the option's own type."""
    option = next(p for p in verb.params if p.name == name)
    if isinstance(value, dict) and name == "slo":
        return ",".join(f"{key}={limit}" for key, limit in value.items())
    if isinstance(option, click.Option) and option.multiple and not isinstance(value, list):
        return str(value).split()
    return value if isinstance(value, bool | list) else str(value)


def _key(word: str) -> str:
    return word.replace("_", "-")


def _names(verb: click.Command) -> dict[str, str]:
    """Names of a verb's options as they are written, without dashes in front, and their parameters' names."""
    return {
        word.lstrip("-"): p.name or ""
        for p in verb.params
        if isinstance(p, click.Option)
        for word in p.opts
        if word.startswith("--")
    }


def _options(verbs: Mapping[str, click.Command]) -> set[str]:
    """Names of the options of these verbs and of those below them."""
    found: set[str] = set()
    for verb in verbs.values():
        found |= _options(verb.commands) if isinstance(verb, click.Group) else _names(verb).keys()
    return found


def _check(path: Path, key: str, known: Mapping[str, object] | set[str], problem: str) -> None:
    if _key(key) not in known:
        near = difflib.get_close_matches(_key(key), known, n=1, cutoff=0.5)
        raise UsageError(f"{path}: {key}: {problem}{f'; did you mean {near[0]}?' if near else ''}")
