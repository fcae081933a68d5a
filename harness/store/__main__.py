"""``python -m harness.store RUN_DIRECTORY s3://BUCKET/PREFIX``: sends a run, or what is missing of it, later."""

import sys

from harness.store.follow import main

sys.exit(main())
