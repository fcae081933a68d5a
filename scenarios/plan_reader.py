"""The window of the plan: a worker's requests, read and prepared a bounded time before they are due.

A plan of any length fits into memory: its prompts are read a batch at a time, the next batch by a thread while this one
is used, and each request becomes bytes when `Schedule` asks for it. Only whole columns without prompts are looked at
before the start, to know how many requests there are and that they can be sent in this order.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gevent
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from harness.errors import HarnessError, PlanError
from harness.plan.file import Request, iter_batches, read_plan_columns, requests_in
from harness.record.run_spec import RunSpec
from scenarios.payload import Lengths, draft, most_tokens, prepare
from scenarios.schedule import Planned, Schedule


class PlanReader:
    """An iterator over a worker's requests, each prepared when it is asked for; in the order of the plan.

    ``requests`` is how many there are in all. Use it from greenlets: one that asks while a batch is being read waits.

    Raises `PlanError` for a plan that cannot be read or sent this way, `UsageError` for prompts that do not fit the
    endpoint; from the iterator, too.
    """

    def __init__(
        self,
        plan: Path,
        spec: RunSpec,
        worker: int = 0,
    ) -> None:
        self._plan, self._worker, self._workers = plan, worker, spec.workers
        self._timed = timed = spec.mode == "open"
        self._endpoint, self._model, self._extra_body = spec.endpoint, spec.model, spec.extra_body
        self._stream, self._lengths = spec.stream, Lengths(spec.length_field, spec.output_lengths)
        table = self._columns(["request_id", "scheduled_ns", "after", "continues"])
        self.requests: int = table.num_rows
        if timed and table["scheduled_ns"].null_count:
            first = table["request_id"].filter(table["scheduled_ns"].is_null())[0]
            raise PlanError(
                f"request {first} has no time: this plan is for a closed loop; run it as one, or make a plan with "
                "arrivals"
            )
        self._awaited = _awaited(table)
        self._kept = _kept(table)
        self._read = 0
        self._batches = iter_batches(plan, worker, spec.workers)
        self._rows: Iterator[Request] = iter(())
        self._coming = self._read_ahead()

    def _columns(self, names: list[str]) -> pa.Table:
        table = read_plan_columns(self._plan, [*names, "slice"])
        mine = table["slice"].to_numpy() % self._workers == self._worker
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
        self._read += 1  # not before: what cannot be prepared has a row, too
        return planned

    def _prepare(self, request: Request) -> Planned:
        continues, kept = bool(request.continues), request.request_id in self._kept
        payload, turn = b"", None
        if continues or kept:
            turn = draft(
                request, endpoint=self._endpoint, model=self._model, extra_body=self._extra_body, stream=self._stream,
                lengths=self._lengths, kept=kept,
            )  # fmt: skip
        else:
            payload = prepare(
                request, endpoint=self._endpoint, model=self._model, extra_body=self._extra_body, stream=self._stream,
                lengths=self._lengths,
            )  # fmt: skip
        return Planned(
            request.request_id, request.scheduled_ns, request.after, request.think_ns or 0, payload, request.slice,
            request.cancel_after_ns, request.timeout_ns, turn, continues, kept,
            most_tokens(request, self._extra_body, self._lengths),
        )  # fmt: skip

    def _read_ahead(self) -> Any:
        return gevent.get_hub().threadpool.spawn(_next, self._batches)

    def schedule(self) -> Schedule:
        """The order of these requests, those of the first seconds prepared."""
        schedule = Schedule(self, timed=self._timed, requests=self.requests, awaited=self._awaited)
        while schedule.wants_more(0) and schedule.read_more():
            pass
        return schedule

    def unread(self) -> Iterator[tuple[int, int | None]]:
        """request_id and planned time of every request that was not asked for yet."""
        rest = self._columns(["request_id", "scheduled_ns"]).slice(self._read)
        for batch in rest.to_batches(max_chunksize=1024):
            yield from zip(batch["request_id"].to_pylist(), batch["scheduled_ns"].to_pylist(), strict=True)


def _next(batches: Iterator[pa.RecordBatch]) -> pa.RecordBatch | HarnessError | None:
    """The next batch, None after the last, or what went wrong: gevent reports what its threads raise as a bug."""
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
    """The ids whose answers a later turn carries. Raises `PlanError` when two turns go on from the same one."""
    continued = table.filter(pc.fill_null(table["continues"], False))["after"]
    kept = frozenset(continued.to_pylist())
    if None in kept or len(kept) < len(continued):
        raise PlanError("this plan's live conversations are damaged: each turn goes on from one of its own before it")
    return kept
