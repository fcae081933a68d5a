"""Load scenarios: a plan goes in, requests go out on its schedule, and a result row for each comes out.

`replay` (open loop) and `saturate` (closed loop) are what Locust runs; `worker` runs one of them as a process of its
own. `client` sends the requests and times the answers. Nothing outside this folder imports Locust or gevent.
"""

import os

# Read when Arrow is imported. Its own allocator keeps more memory than the small batches of a load worker need.
os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
