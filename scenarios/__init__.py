"""Load scenarios: the streaming client, the pace at which a plan is sent, and the Locust users that send it.

The hot path is `client` (bytes and stamps) and `load` (what goes out when); `response` and `completion` turn the bytes
into facts afterwards. Nothing outside this folder imports Locust or gevent.
"""

import os

# Read when Arrow is imported. Its own allocator keeps more memory than the small batches of a load worker need.
os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
