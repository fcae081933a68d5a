"""A locustfile of one's own: an LLM plan beside a plain HTTP page that the same gateway serves.

The plan is sent by the harness's user class, with its clock, connection and rows; `Page` is any Locust user.

    harness plan trace.jsonl --base-url http://10.0.0.5:8000/v1 --model mistral-7b -o plan.arrow
    locust -f mixed_locustfile.py --headless -u 2 --host http://10.0.0.5:8000 \
        --plan plan.arrow --model mistral-7b --results rows.arrows

Locust's own table then has ttft and whole answers beside the page; ``rows.arrows`` has one row for each request
(`harness.record.results.read_results`).
"""

from __future__ import annotations

from typing import Any

from locust import HttpUser, constant_pacing, events, task

from harness.scenarios.replay import Replay  # importing it adds --plan, --model, --endpoint and --results


class Plan(Replay):
    """The plan, at its own times; one user sends all of it."""

    fixed_count = 1


class Page(HttpUser):  # type: ignore[misc]  # Locust ships no types
    """A page that somebody looks at twice a second while the models answer."""

    wait_time = constant_pacing(0.5)

    @task  # type: ignore[untyped-decorator]
    def models(self) -> None:
        """Ask for the list of models."""
        self.client.get("/v1/models", name="models")


@events.quitting.add_listener  # type: ignore[untyped-decorator]
def judge(environment: Any, **_: object) -> None:
    """End with status 4 when the page was slow: a condition in Locust's own way."""
    page = environment.stats.get("models", "GET")
    if page.num_requests and page.get_response_time_percentile(0.95) > 500:
        environment.process_exit_code = 4
