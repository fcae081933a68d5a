"""Which column of a table is what: names that are common for the time, the counts, the session and the model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from harness.errors import UsageError, unknown_name
from harness.trace.formats.asked import ROLES, Role
from harness.trace.formats.clock import unit_of

_COMMON: dict[Role, str] = {
    "arrival": "arrival arrival_time arrivals arrived_at arrival_timestamp arrived timestamp time_stamp ts "
    "request_time request_timestamp requested_at request_start request_received received_at received "
    "request_start_time start_time start_timestamp started_at start created_at created submitted_at "
    "sent_at event_time event_timestamp date_time datetime time epoch epoch_time epoch_timestamp timestamp_epoch "
    "time_epoch arrival_epoch unix_time unix_timestamp unix_epoch unix timestamp_unix time_unix arrival_unix "
    "start_time_unix event_time_unix request_time_unix t",
    "input": "input_tokens prompt_tokens input_length prompt_length input_len prompt_len num_prompt_tokens "
    "num_input_tokens num_prefill_tokens prefill_tokens n_prompt_tokens n_input_tokens nb_input_tokens context_tokens "
    "request_tokens query_tokens prompt_token_count input_token_count prompt_tokens_count input_tokens_count "
    "tokens_prompt tokens_input tokens_in input_toks prompt_toks prompt_num_tokens input_num_tokens isl "
    "input_sequence_length total_prompt_tokens total_input_tokens llm_token_count_prompt gen_ai_usage_input_tokens "
    "gen_ai_usage_prompt_tokens tokens_per_prompt promptlen",
    "output": "output_tokens completion_tokens generated_tokens generation_tokens response_tokens output_length "
    "completion_length response_length generation_length output_len completion_len response_len num_output_tokens "
    "num_completion_tokens num_generated_tokens num_generation_tokens num_decode_tokens decode_tokens n_output_tokens "
    "n_completion_tokens n_generated_tokens nb_output_tokens answer_tokens completion_token_count output_token_count "
    "completion_tokens_count output_tokens_count generated_token_count tokens_completion tokens_output tokens_out "
    "tokens_generated output_toks completion_toks output_num_tokens completion_num_tokens osl output_sequence_length "
    "total_completion_tokens total_output_tokens llm_token_count_completion gen_ai_usage_output_tokens "
    "gen_ai_usage_completion_tokens",
    "session": "session_id session conversation_id conversation thread_id chat_session_id chat_session dialog_id",
    "model": "model model_name response_model request_model served_model llm_model_name deployment_name model_id",
    "cached": "cached_tokens cached_input_tokens cached_prompt_tokens prompt_cached_tokens input_cached_tokens "
    "cache_hit_tokens num_cached_tokens cache_read_tokens",
}


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


COMMON: dict[str, tuple[int, Role]] = {
    _plain(name): (rank, role) for role, names in _COMMON.items() for rank, name in enumerate(names.split())
}
"""Name without case and marks -> (how early it is taken of several, what it is)."""


def role_of(name: str) -> Role | None:
    """What a column of this name is; None: nothing known."""
    name = name.removeprefix("usage.")
    found = COMMON.get(_plain(name))
    if found is None:
        bare, unit = unit_of(name)
        found = COMMON.get(_plain(bare)) if unit else None
        if found is not None and found[1] != "arrival":
            return None
    return None if found is None else found[1]


def recognised(names: Iterable[str]) -> dict[Role, str]:
    """Role -> the column for it; of several the one whose name says it best."""
    best: dict[Role, tuple[int, int, str]] = {}
    for at, name in enumerate(names):
        role = role_of(name)
        if role is None:
            continue
        bare = name.removeprefix("usage.")
        rank = (COMMON.get(_plain(bare)) or COMMON[_plain(unit_of(bare)[0])])[0]
        best[role] = min(best.get(role, (rank, at, name)), (rank, at, name))
    return {role: best[role][2] for role in ROLES if role in best}


def is_table(found: Mapping[Role, str]) -> bool:
    """Whether these columns are enough to replay: a length of the prompt, and a time or a length of the answer."""
    return "input" in found and ("output" in found or "arrival" in found)


def parse_map(text: str) -> dict[Role, str]:
    """``arrival=ts,input=p,output=c`` as roles and columns. Raises `UsageError`."""
    found: dict[Role, str] = {}
    for part in text.split(","):
        role, equals, column = (piece.strip() for piece in part.partition("="))
        if not equals or not column:
            raise UsageError(f"--map {text!r}: expected ROLE=COLUMN,..., with roles {', '.join(ROLES)}")
        if role not in ROLES:
            raise unknown_name("role", role, ROLES)
        if role in found:
            raise UsageError(f"--map {text!r}: {role} is named twice")
        found[role] = column
    return found
