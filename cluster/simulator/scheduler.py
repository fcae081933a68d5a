"""Which sequences an engine works on in each step: the scheduler of vLLM v1, without a clock of its own.

A driver asks for a step (`Scheduler.begin`), lets its time pass on whatever clock it has, and ends it
(`Scheduler.end`). A prompt that is read to its end in a step has its first token at the end of that step; each later
step gives one more. With ``async_scheduling`` a step is begun, that is planned, when the one before it starts to run,
and at most two are begun at once.

- Running sequences first, in the order of their admission, then waiting ones, first come first served, while seats and
  tokens of the step last. Several prompts may be read in a step, of which the last is cut to fit.
- A prompt is admitted only if all of it fits into the KV cache. A sequence that needs a block when none is free throws
  out the last admitted, maybe itself; that one waits in front of all others and reads its prompt and its answer so far
  again. Nobody is admitted in such a step.
- Blocks count as filled when they are planned, so that a prompt hits what another in the same step begins to read. The
  last token of a prompt is always read.

Proved step by step against vLLM's own `Scheduler` and `AsyncScheduler` (tests/vllm_oracle.py); `VLLM` is the version.
The work of a step depends on what changes, not on how many decode. Speculative decoding, LoRA, sliding windows,
priorities and disaggregated prefill are not here.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator

from harness.cluster.simulator.blocks import ENDLESS, Block, KVCache
from harness.cluster.simulator.limits import Limits as Limits
from harness.cluster.simulator.sequence import Sequence as Sequence
from harness.cluster.simulator.step_time import Chunk

VLLM = "0.32.0"
"""Whose scheduling this is."""
NOBODY: list[Sequence] = []
NONE: list[Block] = []
"""Never changed."""


class Scheduler:
    """The state of one engine between steps."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._most = limits.max_num_seqs
        self._room = ENDLESS if limits.max_num_batched_tokens is None else limits.max_num_batched_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: dict[Sequence, None] = {}
        """Those with a seat, in the order of their admission."""
        self.reading: list[Sequence] = []
        """Of these, whose prompt is cut: one at most."""
        self.decoding: dict[Sequence, None] = {}
        """Of these, who get a token in the next step. The rest has its last token in a step that has not ended."""
        self.context = 0
        """Sum of the lengths of the decoding sequences, tokens."""
        self.in_flight = 0
        """Sequences that wait or run."""
        self.step = 0
        """Number of steps that have ended."""
        self.begun = 0
        """Number of steps that have begun."""
        self.preemptions = 0
        """How often a sequence was thrown out."""
        self._leaving: dict[int, list[Sequence]] = {}
        """Who has the last token in a step that has not ended, by its number; in the order of admission."""
        self._lag = int(limits.async_scheduling)
        """Steps until others may use a block that one filled."""
        self._sharing = 0
        """Decoding sequences of whose answers others may use blocks, too."""
        self._ends: list[int] = []
        """A heap of those numbers."""
        self._stuck = False
        """Whether the step that was planned last found no room in the KV cache for the first that waits."""
        caches = limits.kv_blocks is not None or limits.prefix_cache
        self._kv = KVCache(limits.kv_blocks) if caches else None
        self._growing: list[dict[Sequence, None]] = [{} for _ in range(limits.block_size if caches else 0)]
        """Decoding sequences by when they need a block: when a step's number, modulo the block size, is the index."""

    def sequences(self) -> Iterator[Sequence]:
        """All in flight, each once."""
        yield from self.waiting
        yield from self.running
        for step in range(self.step, self.begun):
            yield from (one for one in self._leaving.get(step, NOBODY) if one not in self.running)

    def tokens_given(self) -> Iterator[tuple[Sequence, int]]:
        """Who has a token at the end of the first step in progress, and how many it has then. Asked before `end`."""
        step = self.step
        for sequence in self.sequences() if self.preemptions else self.running:
            if sequence.since < 0 or sequence.since > step:
                continue
            if sequence.read == sequence.to_read:
                yield sequence, sequence.given + step - sequence.since + 1
            else:  # thrown out, maybe when the step after this was planned
                before = sequence.resumed[-1][0] if sequence.resumed else 0
                if sequence.since + sequence.given - before == step + 1:
                    yield sequence, sequence.given

    @property
    def kv_free(self) -> int | None:
        """Blocks that can be taken; None: nobody counts them."""
        return None if self._kv is None else self._kv.free

    def add(self, sequence: Sequence) -> None:
        """A request has come. Raises ValueError for one that asks for no output, or that the KV cache cannot hold."""
        if sequence.output_tokens < 1 or sequence.input_tokens < 0:
            raise ValueError(f"request {sequence.number}: {sequence.input_tokens} in, {sequence.output_tokens} out")
        most, size = self.limits.kv_blocks, self.limits.block_size
        if most is not None and sequence.input_tokens + sequence.output_tokens - 1 > most * size:
            raise ValueError(
                f"request {sequence.number}: {sequence.input_tokens} in, {sequence.output_tokens} out, and the KV "
                f"cache holds {most * size} tokens"
            )
        sequence.to_read = sequence.input_tokens + sequence.given
        self.waiting.append(sequence)
        self.in_flight += 1

    def begin(self) -> tuple[list[Chunk], int, int]:
        """Plan the next step and say what it works on: prompt chunks, decoding sequences, their context.

        Neither chunks nor sequences: there is nothing to do before a step ends or a request comes, and no step began.
        """
        chunks: list[Chunk] = []
        ready = NOBODY
        self._stuck = False
        may_admit = self._kv is None or not self._grow(self._kv)
        if self.reading or (may_admit and self.waiting and len(self.running) < self._most):
            ready = self._read(chunks, may_admit=may_admit)
        step, decoding, context = self.begun, len(self.decoding), self.context
        if not decoding and not chunks:
            # where all were thrown out, vLLM plans again at once, or after the step that is in progress
            return self.begin() if self.waiting and self.step == step else ([], 0, 0)
        self.begun = step + 1
        self.context = context + decoding
        if ready:
            self._decode(ready, step)
        if step in self._leaving:
            for sequence in self._leaving[step]:
                self._stop(sequence)
        return chunks, decoding, context

    def _grow(self, kv: KVCache) -> bool:
        """Blocks for the next token of those that decode; whether anybody was thrown out for them."""
        size, step = self.limits.block_size, self.begun
        growing = self._growing[step % size]
        thrown_out = False
        if len(growing) <= kv.free:
            kv.take(len(growing))
        else:
            for sequence in list(growing):
                if sequence not in growing:
                    continue
                while not kv.free:
                    victim = next(reversed(self.running))
                    self._throw_out(victim)
                    thrown_out = True
                    if victim is sequence:
                        break
                else:
                    kv.take(1)
        if self._sharing:
            # the block that this step fills; planned ahead, the last token of it is not known before the next
            filled = growing if self._lag else self._growing[(step + 1) % size]
            for sequence in filled:
                self._fill(sequence, self._cached(sequence) + 1 - self._lag)
        return thrown_out

    def _read(self, chunks: list[Chunk], *, may_admit: bool) -> list[Sequence]:
        """Take prompts into the step; those that it reads to their end."""
        kv, running = self._kv, self.running
        left = self._room - len(self.decoding)
        ready: list[Sequence] = []
        if self.reading and left > 0:
            (sequence,) = self.reading
            done = sequence.read
            new = min(sequence.to_read - done, left)
            if kv is not None:
                size = self.limits.block_size
                blocks = -(-(done + new) // size) - -(-done // size)
                if blocks > kv.free:  # it is the last admitted itself
                    self._throw_out(sequence)
                    return ready
                kv.take(blocks)
            self.reading.clear()
            left -= self._chunk(sequence, new, chunks, ready)
        waiting = self.waiting
        while waiting and may_admit and left > 0 and len(running) < self._most:
            sequence = waiting[0]
            if kv is not None and not self._reserve(kv, sequence, left):
                self._stuck = True
                break
            running[waiting.popleft()] = None
            new = sequence.to_read - sequence.read
            left -= self._chunk(sequence, min(left, new), chunks, ready)
        return ready

    def _chunk(self, sequence: Sequence, new: int, chunks: list[Chunk], ready: list[Sequence]) -> int:
        """Take so many tokens of a prompt into the step."""
        read = sequence.read
        chunks.append(Chunk(new, read))
        sequence.read = read = read + new
        (ready if read == sequence.to_read else self.reading).append(sequence)
        if sequence.known is not None and sequence.keys:
            self._fill(sequence, read)
        return new

    def _reserve(self, kv: KVCache, sequence: Sequence, left: int) -> bool:
        """Find what is there of a prompt and take blocks for its first chunk, if there are enough for all of it."""
        size, to_read = self.limits.block_size, sequence.to_read
        found: list[Block] = []
        idle = own = 0
        if self.limits.prefix_cache:
            most, shared = max(0, to_read - 1) // size, len(sequence.keys)
            if shared:
                found = kv.find(sequence.keys[:most])
                idle = sum(not block.users for block in found)
            if sequence.given and len(found) == shared:
                own = min(kv.find_own(sequence.number), most - shared)
        hit = len(found) + own
        if -(-to_read // size) - hit + idle + own > kv.free:
            return False
        if self.limits.prefix_cache:
            sequence.known = found
            kv.hold(found)
            if own:
                kv.hold_own(sequence.number, own)
        sequence.read = hit * size
        if sequence.cached < 0:
            sequence.cached = sequence.read
        kv.take(-(-min(to_read, sequence.read + left) // size) - hit)
        return True

    def _fill(self, sequence: Sequence, tokens: int) -> None:
        """Its blocks up to so many tokens are full: others may use those that have a key."""
        known, keys = sequence.known, sequence.keys
        if known is not None and self._kv is not None and len(known) < len(keys):
            for key in keys[len(known) : tokens // self.limits.block_size]:
                known.append(self._kv.remember(key))

    def _filled(self, sequence: Sequence) -> int:
        """Full blocks of one that decodes, or has its last token, so far as they are known to be full."""
        last = min(self.begun - 1, sequence.last_step)
        return (sequence.to_read + max(0, last - sequence.since - self._lag)) // self.limits.block_size

    def _decode(self, ready: list[Sequence], step: int) -> None:
        """Prompts are read to their end: a token each in this step, and one in each that follows."""
        leaving = self._leaving
        for sequence in ready:
            sequence.since = step
            if sequence.first_step < 0:
                sequence.first_step = step
            else:
                sequence.resumed += ((sequence.given, step),)
            self.decoding[sequence] = None
            self.context += sequence.to_read + 1
            last = step + sequence.output_tokens - sequence.given - 1
            if last in leaving:
                leaving[last].append(sequence)
            else:
                leaving[last] = [sequence]
                heapq.heappush(self._ends, last)
            if self._growing:
                self._growing[(step + 1 - sequence.to_read) % self.limits.block_size][sequence] = None
                self._sharing += self._shares(sequence)

    def _stop(self, sequence: Sequence) -> None:
        """It gets no further token."""
        del self.decoding[sequence]
        self.context -= sequence.to_read + self.begun - sequence.since
        if self._growing:
            place = (sequence.since + 1 - sequence.to_read) % self.limits.block_size
            del self._growing[place][sequence]
            self._sharing -= self._shares(sequence)

    def _shares(self, sequence: Sequence) -> bool:
        return sequence.known is not None and len(sequence.keys) * self.limits.block_size > sequence.to_read

    def _cached(self, sequence: Sequence) -> int:
        """Tokens in the KV cache of one that decodes, or that has its last token: all but the last that was planned."""
        return sequence.to_read + min(self.begun - 1, sequence.last_step) - sequence.since

    def _throw_out(self, sequence: Sequence) -> None:
        """Free its blocks and its seat; it waits in front, unless it has its last token in a step in progress."""
        self.preemptions += 1
        if sequence in self.decoding:
            tokens, full = self._cached(sequence), self._filled(sequence)
            self._leave_decoding(sequence)
            self._release(sequence, tokens, full)
            sequence.given += self.begun - sequence.since
            sequence.to_read = sequence.input_tokens + sequence.given
        elif sequence in self.reading:
            self._release(sequence, sequence.read, sequence.read // self.limits.block_size)
            self.reading.remove(sequence)
        else:
            self._release(sequence, self._cached(sequence), self._filled(sequence))
            return
        sequence.read = 0
        self.waiting.appendleft(sequence)

    def _leave_decoding(self, sequence: Sequence) -> None:
        self._leaving[sequence.last_step].remove(sequence)
        self._stop(sequence)

    def _release(self, sequence: Sequence, tokens: int, full: int) -> None:
        """Give its seat back, and its blocks, which hold so many tokens and are known to be full."""
        del self.running[sequence]
        if self._kv is not None:
            blocks, known = -(-tokens // self.limits.block_size), sequence.known
            if known is None:
                self._kv.give_back(blocks, NONE)
            else:
                self._kv.give_back(blocks - full, known, full - len(known), sequence.number)
            sequence.known = None

    def end(self) -> list[Sequence]:
        """The first of the steps in progress, if any, has passed; who had the last token in it, by number."""
        step = self.step
        if step == self.begun:
            return []
        self.step = step + 1
        if step not in self._leaving:
            return []
        done = self._leaving.pop(step)
        self.in_flight -= len(done)
        if self._kv is None:
            for sequence in done:
                del self.running[sequence]
        else:
            for sequence in done:
                if sequence in self.running:  # not thrown out since
                    tokens = self._cached(sequence)
                    self._fill(sequence, tokens)
                    self._release(sequence, tokens, tokens // self.limits.block_size)
        return done if len(done) == 1 else sorted(done, key=_number)

    def steady(self) -> int:
        """How many steps can begin and end in which nothing changes but lengths, if nobody comes.

        Asked while a step is in progress. Never too many; where it is hard to say, none.
        """
        ends, decoding, kv = self._ends, len(self.decoding), self._kv
        while ends and ends[0] < self.step:
            heapq.heappop(ends)
        if not decoding or self.reading:
            return 0
        if self.waiting and len(self.running) < self._most and (self._sharing or not self._stuck):
            return 0
        steps = ends[0] - self.begun
        return steps if kv is None else min(steps, kv.free // decoding * self.limits.block_size)

    def skip(self, steps: int) -> None:
        """Begin and end so many of the `steady` steps at once."""
        decoding, kv = len(self.decoding), self._kv
        self.step += steps
        self.context += steps * decoding
        if kv is not None and self._sharing:
            for _ in range(steps):
                self._grow(kv)
                self.begun += 1
            return
        if kv is not None:
            size = self.limits.block_size
            whole, rest = divmod(steps, size)
            kv.take(whole * decoding + sum(len(self._growing[(self.begun + k) % size]) for k in range(rest)))
        self.begun += steps

    def drop(self, sequence: Sequence) -> None:
        """The client has hung up: forget the sequence; what it has in steps in progress comes to nothing."""
        if sequence in self.decoding:
            tokens, full = self._cached(sequence), self._filled(sequence)
            self._leave_decoding(sequence)
            self._release(sequence, tokens, full)
        elif sequence in self.reading:
            self._release(sequence, sequence.read, sequence.read // self.limits.block_size)
            self.reading.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        elif sequence in self._leaving.get(sequence.last_step, NOBODY):
            self._leaving[sequence.last_step].remove(sequence)
            if sequence in self.running:
                self._release(sequence, self._cached(sequence), self._filled(sequence))
        else:
            return  # it has had its last token
        self.in_flight -= 1


def _number(sequence: Sequence) -> int:
    return sequence.number
