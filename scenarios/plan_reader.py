"""Reads a worker's requests from the plan, and encodes the body of each a bounded time before it is due.

A plan of any length fits into memory: its prompts are read a batch at a time, the next batch in a thread, and each
request is encoded when `scenarios.schedule` asks for it. Before the start only columns without prompts are read, to
count the requests and to check that they can be sent in this order.

Source: the OpenAI API reference; vLLM's ``ignore_eos`` forces an output length and ``return_token_ids`` gives the ids
of an answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gevent
import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from harness.errors import HarnessError, PlanError, UsageError
from harness.plan.file import Request, iter_batches, read_plan_columns, requests_in
from harness.record.run_spec import NO_TEMPERATURE, RunSpec
from harness.scenarios.client.completion import StreamedAnswer


@dataclass(frozen=True, slots=True)
class Draft:
    """The body of a turn of a live conversation: JSON with a gap for the history.

    The prompt is a JSON array or string. ``new`` is the part inside it that this turn adds, a history the part that all
    earlier turns added.
    """

    before: bytes
    new: bytes
    after: bytes
    form: str
    """"messages", "text" or "token_ids"."""

    def payload(self, history: bytes = b"") -> bytes:
        """The bytes of the request from its Content-Length header on."""
        return _framed(self.before + self._joined(history, self.new) + self.after)

    def history(self, history: bytes, answer: StreamedAnswer) -> bytes | None:
        """The history of the next turn: this turn with its own ``history``, and the answer.

        Null when the server sent no token ids.
        """
        asked = self._joined(history, self.new)
        if self.form == "messages":
            return self._joined(asked, msgspec.json.encode({"role": "assistant", "content": answer.text}))
        if self.form == "text":
            return asked + msgspec.json.encode(answer.text)[1:-1]
        if not answer.token_ids and answer.parts:
            return None
        return self._joined(asked, msgspec.json.encode(answer.token_ids)[1:-1])

    def _joined(self, first: bytes, second: bytes) -> bytes:
        return first + b"," + second if first and second and self.form != "text" else first + second


def prepare(request: Request, spec: RunSpec) -> bytes:
    """The bytes of one request from its Content-Length header on; `Endpoint.head` comes before them.

    It asks for its own ``model`` if the plan has one. Generation is greedy (`NO_TEMPERATURE` aside), and of
    ``output_tokens`` as the spec says, when the plan has them. ``extra_body`` fields win over ours; a null there
    removes the field (for servers that refuse one they do not know).

    Raises `UsageError` when the endpoint cannot take this kind of prompt.
    """
    return _framed(_encoded(request, _body(request, spec, spec.extra_body)))


def draft(request: Request, spec: RunSpec, *, kept: bool) -> Draft:
    """Like `prepare`, for one turn of a live conversation. ``kept``: a later turn needs its answer.

    Raises `UsageError` also for an ``extra_body`` with a prompt of its own or one that asks for several answers.
    """
    extra = spec.extra_body
    if taken := {"messages", "prompt"} & extra.keys():
        raise UsageError(f"--extra-body must not say {taken.pop()}: a live conversation makes its own")
    for name in ("n", "best_of"):
        if extra.get(name) not in (None, 1):
            raise UsageError(f"--extra-body asks for several answers ({name}): a live conversation goes on from one")
    if extra.get("echo"):
        raise UsageError("--extra-body must not say echo: a live conversation carries the answer, not the prompt twice")
    form = "messages" if spec.endpoint == "chat" else "text" if request.prompt_token_ids is None else "token_ids"
    if kept and form == "token_ids":
        extra = {"return_token_ids": True, **extra}
    body = _body(request, spec, extra)
    name = "messages" if form == "messages" else "prompt"
    prompt = _encoded(request, body.pop(name))
    before, after = b'{"%b":%b' % (name.encode(), prompt[:1]), prompt[-1:] + b"," + _encoded(request, body)[1:]
    return Draft(before, prompt[1:-1], after, form)


def most_tokens(request: Request, spec: RunSpec) -> int | None:
    """Most output tokens that this request allows, over all its choices; null when it sets no limit."""
    extra = spec.extra_body
    named = {spec.length_field: None if spec.output_lengths == "free" else request.output_tokens, **extra}
    fields = (spec.length_field, "max_tokens", "max_completion_tokens")
    asked = [n for name in fields if isinstance(n := named.get(name), int)]
    answers = [n for n in (extra.get("n"), extra.get("best_of"), 1) if isinstance(n, int)]
    return max(asked) * max(answers) if asked else None


def _framed(raw: bytes) -> bytes:
    return b"Content-Length: %d\r\n\r\n%b" % (len(raw), raw)


def _encoded(request: Request, value: object) -> bytes:
    try:
        return msgspec.json.encode(value)
    except (TypeError, ValueError) as e:
        raise UsageError(f"request {request.request_id} cannot be written as JSON: {e}") from e


def _body(request: Request, spec: RunSpec, extra_body: Mapping[str, object]) -> dict[str, object]:
    body: dict[str, object] = {"model": request.model or spec.model}
    if spec.endpoint == "completions":
        if request.messages is not None:
            raise UsageError(f"request {request.request_id} holds chat messages: use the chat endpoint")
        body["prompt"] = request.prompt_token_ids if request.prompt_token_ids is not None else request.prompt_text
    else:
        body["messages"] = _messages(request)
    if request.output_tokens is not None and spec.output_lengths != "free":
        body[spec.length_field] = request.output_tokens
        if spec.output_lengths == "forced":
            body["ignore_eos"] = True
    if spec.length_field != NO_TEMPERATURE:
        body["temperature"] = 0
    body["stream"] = spec.stream
    if spec.stream:
        body["stream_options"] = {"include_usage": True}
    for name, value in extra_body.items():
        if value is None:
            body.pop(name, None)
        else:
            body[name] = value
    return body


def _messages(request: Request) -> object:
    if request.messages is not None:
        try:
            return msgspec.json.decode(request.messages, type=list[dict[str, Any]])
        except msgspec.DecodeError as e:
            raise UsageError(f"request {request.request_id}: its chat messages are not a JSON list ({e})") from e
    if request.prompt_text is None:
        raise UsageError(
            f"request {request.request_id} is a list of token ids, which the chat endpoint cannot take: "
            "use the completions endpoint, or a plan with text"
        )
    return [{"role": "user", "content": request.prompt_text}]


@dataclass(frozen=True, slots=True)
class Planned:
    """A request ready to be sent; times and links as in `harness.plan.file`."""

    request_id: int
    scheduled_ns: int | None
    after: int | None
    think_ns: int
    payload: bytes
    """Empty if there is a draft."""
    slice: int = 0
    cancel_after_ns: int | None = None
    timeout_ns: int | None = None
    draft: Draft | None = None
    """For a turn of a live conversation that continues another, or is continued."""
    continues: bool = False
    kept: bool = False
    """A later turn continues from this answer."""
    most_tokens: int | None = None
    """As `most_tokens`."""

    @property
    def size(self) -> int:
        """Bytes it holds."""
        return len(self.payload) + (len(self.draft.new) if self.draft else 0)


class PlanReader:
    """An iterator over a worker's requests in the order of the plan; each is prepared when it is asked for.

    ``requests`` is their number, ``awaited`` the ids that others wait for, ascending; ``timed``: in an open loop. Use
    it from greenlets: one that asks while a batch is being read waits.

    Raises `PlanError` for a plan that cannot be read or sent this way, `UsageError` for prompts that do not fit the
    endpoint; from the iterator, too.
    """

    def __init__(self, plan: Path, spec: RunSpec, worker: int = 0) -> None:
        self._plan, self._spec, self._worker = plan, spec, worker
        self.timed = timed = spec.mode == "open"
        table = self._columns(["request_id", "scheduled_ns", "after", "continues"])
        self.requests: int = table.num_rows
        if timed and table["scheduled_ns"].null_count:
            first = table["request_id"].filter(table["scheduled_ns"].is_null())[0]
            raise PlanError(
                f"request {first} has no time: this plan is for a closed loop; run it as one, or make a plan with "
                "arrivals"
            )
        self.awaited = _awaited(table)
        self._kept = _kept(table)
        self._read = 0
        self._batches = iter_batches(plan, worker, spec.workers)
        self._rows: Iterator[Request] = iter(())
        self._coming = self._read_ahead()

    def _columns(self, names: list[str]) -> pa.Table:
        table = read_plan_columns(self._plan, [*names, "slice"])
        mine = table["slice"].to_numpy() % self._spec.workers == self._worker
        return table.filter(pa.array(mine)).select(names)

    def __iter__(self) -> PlanReader:
        return self

    def __next__(self) -> Planned:
        while (request := next(self._rows, None)) is None:
            coming = self._coming
            batch = coming.get()  # others may run now, and ask for the same
            if batch is None:
                raise StopIteration
            if isinstance(batch, HarnessError):
                raise batch
            if coming is self._coming:
                self._rows, self._coming = requests_in(batch), self._read_ahead()
        planned = self._prepare(request)
        self._read += 1  # not before: a request that cannot be prepared has a row, too
        return planned

    def _prepare(self, request: Request) -> Planned:
        continues, kept = bool(request.continues), request.request_id in self._kept
        turn = draft(request, self._spec, kept=kept) if continues or kept else None
        payload = prepare(request, self._spec) if turn is None else b""
        return Planned(
            request.request_id, request.scheduled_ns, request.after, request.think_ns or 0, payload, request.slice,
            request.cancel_after_ns, request.timeout_ns, turn, continues, kept,
            most_tokens(request, self._spec),
        )  # fmt: skip

    def _read_ahead(self) -> Any:
        return gevent.get_hub().threadpool.spawn(_next, self._batches)

    def unread(self) -> Iterator[tuple[int, int | None]]:
        """request_id and planned time of every request that was not read yet."""
        rest = self._columns(["request_id", "scheduled_ns"]).slice(self._read)
        for batch in rest.to_batches(max_chunksize=1024):
            yield from zip(batch["request_id"].to_pylist(), batch["scheduled_ns"].to_pylist(), strict=True)


def _next(batches: Iterator[pa.RecordBatch]) -> pa.RecordBatch | HarnessError | None:
    """The next batch, None after the last, or the error: gevent reports whatever its threads raise as a bug."""
    try:
        return next(batches, None)
    except HarnessError as e:
        return e


def _awaited(table: pa.Table) -> npt.NDArray[np.int64]:
    """The ids that others wait for, ascending. Raises `PlanError` when one does not come before those."""
    ids = table["request_id"].to_numpy()
    waits = table["after"].is_valid().to_numpy()
    after = table["after"].drop_null().to_numpy()
    bad = np.flatnonzero(~np.isin(after, ids) | (after >= ids[waits]))
    if len(bad):
        raise PlanError(f"request {ids[waits][bad[0]]} waits for {after[bad[0]]}, which does not come before it here")
    return np.sort(after)


def _kept(table: pa.Table) -> frozenset[int]:
    """The ids whose answers a later turn contains. Raises `PlanError` when two turns continue the same one."""
    continued = table.filter(pa.array(table["continues"].fill_null(False).to_numpy().astype(bool)))["after"]
    kept = frozenset(continued.to_pylist())
    if None in kept or len(kept) < len(continued):
        raise PlanError("this plan's live conversations are damaged: each turn goes on from one of its own before it")
    return kept
