"""JSON out of an answer, and whether a schema allows it."""

from __future__ import annotations

import json
import math
from functools import lru_cache
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from jsonschema_rs import Validator

Json = bool | int | float | str | None | list["Json"] | dict[str, "Json"]
_SPACE = " \t\r\n\ufeff"


def unfenced(answer: str) -> str:
    """What the first code fence of the answer holds, to its end where it is not closed; without a fence all of it."""
    _, fence, rest = answer.partition("```")
    if not fence:
        return answer
    language, line_end, body = rest.partition("\n")
    if not line_end or len(language) > 20:
        body = rest
    return body.partition("```")[0]


def read_json(answer: str) -> Json:
    """The value. Raises ValueError for what is not RFC 8259, has a key twice, is too deep, or too large a number."""
    text = answer.strip(_SPACE)
    if text.startswith("```"):
        text = unfenced(text).strip(_SPACE)
    try:
        value: Json = json.loads(
            text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite, parse_int=_whole
        )
        json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair is not text
    except RecursionError as e:
        raise ValueError("too deep") from e
    return value


def _unique(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key twice")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError("too large")
    return number


def _whole(digits: str) -> int | float:
    return int(digits) if len(digits) <= 300 else _finite(digits)


@lru_cache(maxsize=256)
def validator(schema: bytes) -> Validator:
    """Compiled once, from JSON. It asks no network and no file, and its patterns match in linear time."""
    import jsonschema_rs

    return jsonschema_rs.validator_for(
        json.loads(schema), offline=True, pattern_options=jsonschema_rs.RegexOptions(size_limit=1 << 20)
    )
