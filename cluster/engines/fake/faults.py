"""What a request can ask the fake server to do wrong."""

from __future__ import annotations

FAULTS = {
    "http500": "HTTP 500 with a JSON error",
    "http429": "HTTP 429",
    "http400": "HTTP 400",
    "redirect": "HTTP 307 to elsewhere",
    "html": "HTTP 200 with an HTML page",
    "hang": "no byte, ever",
    "stall": "two tokens, then silence",
    "cut": "two tokens, then the connection closes",
    "reset": "the connection closes before any byte",
    "error_event": "two tokens, then an error event and a regular end",
    "no_done": "all tokens, finish reason, but no [DONE]",
    "no_finish": "two tokens, then a regular end of the HTTP body with neither finish reason nor [DONE]",
    "no_usage": "no usage chunk",
    "short": "half of the tokens that were asked for",
    "bundle": "every chunk holds two tokens",
    "bulk": "all events together, when the last is due",
    "empty": "no token, a finish reason, and no usage",
    "only_done": "nothing but [DONE]",
    "double_usage": "usage says twice the tokens that were streamed",
    "half_usage": "usage says half of the tokens that were streamed",
    "hidden_reasoning": "usage declares as many reasoning tokens again, which were not streamed",
    "crlf": "events end in CR LF, with comments between them",
    "cr": "events end in CR, with comments between them",
    "json_label": "a stream that is labelled application/json",
    "no_data": "an event without data before the first",
    "odd_fields": "a finish reason that is a number, and a cached count of -1",
    "late_zeros": "a usage of zeros after the real one",
}
