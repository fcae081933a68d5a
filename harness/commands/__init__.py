"""What each verb does; `harness.cli` holds their options and help.

Only this package and `harness.cli` see all four packages, and only inside functions, so that a replay against an
existing server loads neither Ray nor vLLM.
"""

from harness.commands.catalogue import doctor, models, refresh_tiers, tiers
from harness.commands.flow import plan, replay, run, serve
from harness.commands.proof import calibrate, crosscheck
from harness.commands.reports import report, report_page

__all__ = [
    "calibrate",
    "crosscheck",
    "doctor",
    "models",
    "plan",
    "refresh_tiers",
    "replay",
    "report",
    "report_page",
    "run",
    "serve",
    "tiers",
]
