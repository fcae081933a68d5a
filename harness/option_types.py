"""Options of the command line: what their words mean, and how a field of a class of options becomes one (`opt`).

Each type refuses what it does not know, and says what it accepts.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import Field, field, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import click

from harness.errors import UsageError
from harness.slo import nearest_key, split_key

_SECONDS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
Options = TypeVar("Options")


class Parsed(click.ParamType):  # type: ignore[type-arg]  # generic only in newer click
    """What ``parse`` makes of a word; its `UsageError` says what is accepted. What is not text stays as it is."""

    def __init__(self, name: str, parse: Callable[[str], Any], show: Callable[[Any], str] = str) -> None:
        self.name, self._parse = name, parse
        self.show = show

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return self._parse(value.strip())
        except UsageError as e:
            self.fail(str(e), param, ctx)


def parse_duration(text: str) -> float | None:
    """Seconds; null when ``text`` is not a duration."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)?", text.strip())
    return float(match[1]) * _SECONDS[match[2] or "s"] if match else None


def _duration(text: str) -> float:
    seconds = parse_duration(text)
    if seconds is None or not 0 < seconds < 1e8:
        raise UsageError(f"{text!r} is not a duration: write 90, 90s, 1.5m, 2h, 3d or 150ms")
    return seconds


def _window(text: str) -> tuple[float, float]:
    begin, _, end = text.partition(":")
    begin_s, end_s = parse_duration(begin or "0"), parse_duration(end)
    if begin_s is None or end_s is None or not begin_s < end_s < 1e10:
        raise UsageError(f"{text!r} is not a window: write its begin and end, like 10m:20m or 0:90s")
    return begin_s, end_s


def _slo(text: str) -> dict[str, float]:
    limits: dict[str, float] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        key, limit = _slo_part(part)
        if key in limits:
            raise UsageError(f"{part!r}: {key} has a limit already")
        limits[key] = limit
    if not limits:
        raise UsageError("no limit: write the SLO like ttft=2s,tpot=100ms")
    return limits


def _slo_part(part: str) -> tuple[str, float]:
    """A key and its limit in seconds; what is written as other tools do is refused with the way to write it here."""
    match = re.fullmatch(r"(?P<key>[^=:<\s]+)\s*(?P<sign>=|:|<=?|\s)\s*(?P<limit>[^=:<\s]+)", part)
    if match is None:
        raise UsageError(f"{part!r}: write a metric and its limit, like ttft=2s or ttft_p99=2s")
    key, limit = match["key"], match["limit"]
    right = nearest_key(key)
    if match["sign"] != "=" or right != key:
        raise UsageError(f"{part!r}: write {right}={limit}")
    split_key(key)
    if re.fullmatch(r"\d+(\.\d+)?", limit):
        raise UsageError(f"{part!r} has no unit: write {key}={limit}ms or {key}={limit}s")
    seconds = parse_duration(limit)
    if not seconds:
        raise UsageError(f"{part!r}: {limit!r} is not a time above 0: write it with its unit, like {key}=100ms")
    return key, seconds


def _percent(text: str) -> float | None:
    """0.4 from ``40%`` or ``0.4``; null for anything outside 0 to 1: nobody knows what a bare 40 means."""
    match = re.fullmatch(r"(\d*\.?\d+)\s*(%?)", text)
    share = round(float(match[1]) / (100 if match[2] else 1), 12) if match else 2.0
    return share if share <= 1 else None


def _share(text: str, least: float = 1e-12) -> float:
    share = _percent(text)
    if share is None or share < least:
        raise UsageError(f"{text!r}: write a share like 40% or 0.4")
    return share


def _stages(text: str) -> Any:
    from harness.plan.arrivals import parse_stages

    return parse_stages(text)


def _columns(text: str) -> Any:
    from harness.trace.formats.table import parse_map

    return parse_map(text)


def _growth(text: str) -> float:
    from harness.plan.arrivals import parse_growth

    return parse_growth(text)


def _warmup(text: str) -> int | float:
    number = int(text) if text.isascii() and text.isdigit() else parse_duration(text)
    if not number or (isinstance(number, float) and text[-1:].isdigit()):
        raise UsageError(f"{text!r}: write a number of requests like 20, or a time with its unit like 30s")
    return number


def _cancel(text: str) -> tuple[float, float]:
    share, at, after = text.partition("@")
    found, after_s = _percent(share), parse_duration(after)
    if not at or not found or not after_s:
        raise UsageError(f"{text!r}: write share@time, like 0.05@2s or 5%@2s")
    return found, after_s


def _json_object(text: str) -> dict[str, object]:
    try:
        decoded = json.loads(text)
    except ValueError as e:
        raise UsageError(f"not JSON: {e}") from e
    if not isinstance(decoded, dict):
        raise UsageError('expected a JSON object, like {"temperature": 0.7}')
    return decoded


def _step_s(text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(part) / 1000 for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) not in (3, 4) or not all(0 <= one < 1e3 for one in values) or values[0] + values[1] <= 0:
        raise UsageError(f"{text!r}: write milliseconds BASE,SEQ,TOKEN or BASE,SEQ,TOKEN,CONTEXT, like 8,0.05,0.02")
    return values


def _range(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d{0,4})(?:\.\.([1-9]\d{0,4}))?", text)
    least, most = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if most < least:
        raise UsageError(f"{text!r}: write a number of servers like 4, or the fewest and the most, like 2..8")
    return least, most


def _scale_on(text: str) -> tuple[str, float]:
    gauge, _, target = text.partition("=")
    if gauge not in ("in-flight", "waiting") or not re.fullmatch(r"\d+(\.\d+)?", target) or not float(target):
        raise UsageError(f"{text!r}: write the requests that each server shall have, like in-flight=32 or waiting=5")
    return gauge, float(target)


def _fail(text: str) -> float | tuple[tuple[int, float], ...]:
    if "@" not in text:
        return _duration(text)
    parts = [part.partition("@") for part in text.split(",")]
    if not all(number.isascii() and number.isdigit() for number, _, _ in parts):
        raise UsageError(f"{text!r}: write a mean time between failures like 4h, or server@time like 0@300s,2@15m")
    return tuple((int(number), _duration(at)) for number, _, at in parts)


def _ratio(text: str) -> tuple[float, float, float | None]:
    try:
        parts = [float(part) for part in text.split(":")]
    except ValueError:
        parts = []
    if not 1 <= len(parts) <= 3 or any(not 0 <= part < 1e6 for part in parts):
        raise UsageError(f"{text!r}: write OUT, IN:OUT or IN:OUT:CACHED, like 4, 1:4 or 1:4:0.25")
    if len(parts) == 1:
        parts = [1.0, *parts]
    if parts[0] + parts[1] <= 0:
        raise UsageError(f"{text!r}: input or output must weigh something")
    return parts[0], parts[1], parts[2] if len(parts) == 3 else None


def _address(text: str) -> str:
    host, _, port = text.rpartition(":")
    if not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise UsageError(
            f"{text!r}: not [HOST:]PORT, like 9464, 0 (any free port) or 0.0.0.0:9464; without a value the option goes "
            "last, or before another option"
        )
    return f"{host.strip('[]') or '127.0.0.1'}:{int(port)}"


COUNT = click.IntRange(min=1)
POSITIVE = click.FloatRange(min=0, min_open=True)
PATH = click.Path(path_type=Path)
EXISTING = click.Path(exists=True, path_type=Path)
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
NEW_FILE = click.Path(dir_okay=False, path_type=Path)
FOLDER = click.Path(file_okay=False, path_type=Path)
DURATION = Parsed("duration", _duration, lambda s: f"{s / 60:g}m" if s > 60 else f"{s:g}s")
"""Seconds from ``90``, ``90s``, ``1.5m``, ``2h``, ``3d`` or ``150ms``."""
WINDOW = Parsed("window", _window)
"""(begin, end) in seconds of trace time from ``10m:20m``."""
SLO = Parsed("slo", _slo)
"""Limits in seconds by key from ``ttft=2s,tpot=100ms`` or ``ttft_p99=2s,tpot_p95=80ms`` (`harness.slo`)."""
SHARE = Parsed("share", _share, lambda share: f"{share * 100:g}%")
"""A share above 0 from ``99%`` or ``0.99``."""
SHARE_OR_NONE = Parsed("share", partial(_share, least=0.0))
"""A share, 0 too, from ``40%`` or ``0.4``."""
STAGES = Parsed("stages", _stages)
"""A tuple of `harness.plan.arrivals.Stage` from ``2m@4,5m@8``."""
COLUMNS = Parsed("columns", _columns)
"""Role of a table's column -> its name, from ``arrival=ts,input=p,output=c``."""
GROWTH = Parsed("growth", _growth, lambda factor: f"{factor:g}x")
"""A factor from ``3x``, ``1.2``, ``+200%`` or ``-20%``."""
WARMUP = Parsed("warmup", _warmup)
"""An integer of requests from ``20``, or a float of seconds from ``30s``."""
CANCEL = Parsed("cancel", _cancel)
"""(share of requests, seconds after they were sent) from ``5%@2s``."""
ADDRESS = Parsed("address", _address)
"""``host:port`` from ``9464`` (then 127.0.0.1) or ``0.0.0.0:9464``."""
STEP = Parsed("step", _step_s)
"""Seconds of a step, and of each sequence, prompt token and context token in it, from milliseconds."""
RANGE = Parsed("range", _range, lambda ends: "..".join(str(n) for n in dict.fromkeys(ends)))
"""(fewest, most) from ``4`` or ``2..8``."""
SCALE_ON = Parsed("gauge", _scale_on)
"""(gauge, requests that each server shall have) from ``in-flight=32`` or ``waiting=5``."""
FAIL = Parsed("failures", _fail)
"""A mean time, s, from ``4h``, or (server, s) of each failure from ``0@300s,2@15m``."""
JSON_OBJECT = Parsed("json", _json_object)
RATIO = Parsed("ratio", _ratio, lambda ratio: ":".join(f"{part:g}" for part in ratio if part is not None))
"""(input, output, cached input or None) from ``4``, ``1:4`` or ``1:4:0.25``."""


def opt(
    help: str, default: Any = None, *, kind: Any = None, flag: str | None = None, metavar: str | None = None,  # noqa: A002
    required: bool = False, bare: Any = None,
) -> Any:  # fmt: skip
    """A field of a class of options that is an option of the command line, too: ``help`` describes both.

    ``kind``: a click type or a `Literal`; else found from the name and the default (`click_option`). ``flag``: the ways
    to write it. ``bare``: the value of the option where it is given without one.
    """
    metadata = {"help": help, "kind": kind, "flag": flag, "metavar": metavar, "required": required, "bare": bare}
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


def click_option(f: Field[Any], heading: str, instead: Mapping[str, Any]) -> click.Option:
    """The option of a field made by `opt`; ``instead``: of its facts those that are others here."""
    said = {**f.metadata, **instead}
    default = {} if f.default_factory is dict else f.default
    several, flag, seconds = isinstance(default, tuple) and not said["kind"], default is False, f.name.endswith("_s")
    kind = said["kind"] or (SLO if f.name == "slo" else DURATION if seconds else COUNT if type(default) is int else str)
    if get_origin(kind) is not None:
        kind = click.Choice(get_args(kind))
    word = f.name.rstrip("_").removesuffix("_s" if seconds else "s" if several else "").replace("_", "-")
    flags = (said["flag"] or f"--{word}").split()
    quiet = default in (None, {}, "") or several or flag
    shown = None if quiet else kind.show(default) if isinstance(kind, Parsed) else True
    given: dict[str, Any] = {} if several or default in (None, "") else {"default": default}  # None would be a value
    if said["bare"] is not None:
        given["flag_value"] = said["bare"]
    option = click.Option(
        [*flags, f.name], help=said["help"], metavar=said["metavar"], multiple=several, is_flag=flag,
        type=None if flag else kind, required=said["required"], show_default=shown,
        **given,
    )  # fmt: skip
    option.group = heading  # type: ignore[attr-defined]
    return option


def options_of(kind: type[Any], *names: str, **instead: str | Mapping[str, object]) -> list[click.Option]:
    """The options of a class, groups inside it included: of all its fields, or of ``names`` and those in ``instead``.

    ``instead``: another help of a field, or several other facts of it. A class says in ``heading`` under which its
    options stand in the full help.
    """
    wanted = {*names, *instead}
    found: list[click.Option] = []
    for f in fields(kind):
        if inner := _inner(f):
            found += options_of(inner)
        elif "help" in f.metadata and (not wanted or f.name in wanted):
            owner = next(base for base in kind.__mro__ if f.name in inspect.get_annotations(base))
            other = instead.get(f.name, {})
            found.append(
                click_option(
                    f, getattr(owner, "heading", "Options"), {"help": other} if isinstance(other, str) else other
                )
            )
    return found


def made(kind: type[Options], params: Mapping[str, object]) -> Options:
    """The options of a class out of the parameters of a verb; those that the verb does not have keep their defaults.

    Click has checked every value by the option's own type.
    """
    found: dict[str, object] = {}
    for f in fields(kind):  # type: ignore[arg-type]
        if inner := _inner(f):
            found[f.name] = made(inner, params)
        elif params.get(f.name) is not None:
            found[f.name] = params[f.name]
    return kind(**found)


def _inner(f: Field[Any]) -> type[Any] | None:
    kind: object = f.default_factory
    return kind if isinstance(kind, type) and is_dataclass(kind) else None
