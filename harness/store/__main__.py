"""``python -m harness.store RUN_DIRECTORY s3://BUCKET/PREFIX``."""

import sys

from harness.store.follow import main

sys.exit(main())
