"""A Ray of this machine in a process of its own: ``python -m cluster.deploy.ray_head``.

Ray starts half a dozen processes, and some of them outlive a killed driver by a minute. Here all of them are below one
command, so the guard of that command ends them like anything else. It listens on loopback only and requires a random
token of the run (`cluster.deploy.ray_session` sets both). Prints one line of JSON with the address and waits.
"""

from __future__ import annotations

import json
import os
import signal

NICENESS = "RAY_worker_niceness"
"""How much nicer than itself Ray starts workers, and so servers. Its own choice is 15: then whatever else runs on the
machine goes first. 0 wherever a Ray for the harness is started."""

OBJECT_STORE_BYTES = 100 << 20
"""Ray's own smallest is 75 MB; nothing large goes through it here."""


def main() -> None:
    """Start Ray, say where it is, wait to be ended."""
    os.environ[NICENESS] = "0"  # before Ray is imported
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
