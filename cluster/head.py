"""A Ray of this machine in a process of its own: ``python -m cluster.head``.

Ray starts half a dozen processes, and some of them outlive a killed driver by a minute. Here all of them are below one
command, so the guard of that command ends them like anything else. Prints one line of JSON with the address and waits.
"""

from __future__ import annotations

import json
import signal

OBJECT_STORE_BYTES = 100 << 20
"""Ray's own smallest is 75 MB; nothing large goes through it here."""


def main() -> None:
    """Start Ray, say where it is, wait to be ended."""
    import ray

    ray.init(
        address="local",
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        log_to_driver=False,
        logging_level="ERROR",
    )
    print(json.dumps({"address": ray.get_runtime_context().gcs_address}), flush=True)
    signal.pause()


if __name__ == "__main__":
    main()
