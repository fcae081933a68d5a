"""Seeds: one number that gives a plan again, bit for bit, whether it was stated or drawn.

Its lower 32 bits decide the load: arrivals, lengths, what is sampled and who hangs up. Made-up prompts depend on all of
it. A seed that was not given is drawn above those bits, so that two visits to one server send the same load with
prompts that its prefix cache has not seen.
"""

from __future__ import annotations

import secrets

_LOAD_BITS = 32
_DRAWN_BITS = 20
"""With the others 52: a number that every JSON reader keeps whole."""


def drawn_seed() -> int:
    """A seed for whom none was stated: the load of seed 0, and prompts of its own."""
    return (1 + secrets.randbelow(2**_DRAWN_BITS - 1)) << _LOAD_BITS


def load_seed(seed: int) -> int:
    """What of a seed decides the load; all of a smaller or negative one."""
    return seed if seed < 2**_LOAD_BITS else seed & (2**_LOAD_BITS - 1)


def with_load(seed: int, load: int) -> int:
    """``seed`` with another load (of 32 bits at most), and its prompts kept apart from those of other seeds."""
    return load if seed < 2**_LOAD_BITS else seed - load_seed(seed) + load
