"""Prometheus text by its grammar: what means the same is read the same, and one bad line costs no other."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.record.samples import read_gauges
from harness.server import counters
from harness.server.counters import mean, read_samples, total

SAME = {
    "plain": 'vllm:a_total{engine="0"} 12\n',
    "timestamp": 'vllm:a_total{engine="0"} 12 1764391234567\n',
    "timestamp in seconds": 'vllm:a_total{engine="0"} 12.0 1764391234.567\n',
    "spaces": ' vllm:a_total  { engine = "0" , }   1.2e1 \t \n',
    "tabs": 'vllm:a_total{engine="0"}\t12\t7\n',
    "no space behind labels": 'vllm:a_total{engine="0"}12\n',
    "crlf": '# TYPE vllm:a_total counter\r\nvllm:a_total{engine="0"} 12\r\n',
    "no line end": 'vllm:a_total{engine="0"} 12',
    "openmetrics": '# TYPE vllm:a counter\nvllm:a_total{engine="0"} 12\nvllm:a_created{engine="0"} 1.7e9\n# EOF\n',
    "exemplar": 'vllm:a_total{engine="0"} 12 # {trace_id="a b"} 0.67 1764391234.5\n# EOF\n',
    "timestamp and exemplar": 'vllm:a_total{engine="0"} 12 1764391234 # {trace_id="} 9"} 0.67\n# EOF\n',
    "after the end": 'vllm:a_total{engine="0"} 12\n# EOF\nvllm:a_total{engine="1"} 5\n',
    "quoted name": '{"vllm:a_total",engine="0"} 12\n',
    "bad lines": 'vllm:a_total{engine="0" 5\n}{\nvllm:a_total{engine="0"} 12\nvllm:a_total\nvllm:a_total{} many\n',
}


@pytest.mark.parametrize("text", SAME.values(), ids=SAME)
def test_one_value_in_every_lawful_writing(text: str) -> None:
    assert [(s.name, s.labels, s.value) for s in read_samples(text, lambda name: name == "vllm:a_total")] == [
        ("vllm:a_total", {"engine": "0"}, 12.0)
    ]
    assert counters.parse_counters(text) == {"vllm:a_total": 12.0}


@pytest.mark.parametrize(
    ("written", "label"),
    [(r"a\"b", 'a"b'), (r"a\\", "a\\"), (r"a\nb", "a\nb"), ("}, {", "}, {"), ("a 1 2", "a 1 2"), ("#", "#"), ("", "")],
)
def test_labels_hold_anything(written: str, label: str) -> None:
    (sample,) = read_samples(f'm{{x="{written}",y="z"}} 3 5\n')
    assert (sample.labels, sample.value) == ({"x": label, "y": "z"}, 3.0)


@pytest.mark.parametrize(("written", "value"), [("+Inf", math.inf), ("-Inf", -math.inf), ("1e-05", 1e-5), ("-0", 0.0)])
def test_values(written: str, value: float) -> None:
    assert [s.value for s in read_samples(f"m {written}\n")] == [value]
    assert math.isnan(next(read_samples("m NaN 3")).value)


def test_counts_are_summed_shares_averaged_and_what_is_no_number_is_null() -> None:
    text = (
        'vllm:num_requests_running{engine="0"} 3\nvllm:num_requests_running{engine="1"} 2\n'
        'vllm:kv_cache_usage_perc{engine="0"} 0.25\nvllm:kv_cache_usage_perc{engine="1"} 0.75\n'
        'vllm:prompt_tokens_total{engine="0"} 5\nvllm:prompt_tokens_total{engine="1"} NaN\n'
        "vllm:generation_tokens_total +Inf\nvllm:iteration_tokens_total_count 8\nprocess_start_time_seconds NaN\n"
    )
    found = read_gauges(text, text + "# EOF\n")
    assert (found["running"], found["kv_cache_usage"], found["engine_steps_total"]) == (10.0, 0.5, 16.0)
    assert [found[k] for k in ("prompt_tokens_total", "generation_tokens_total", "process_start_s")] == [None] * 3
    nulls = dict.fromkeys((counters.START_TIME, "vllm:prompt_tokens_total", "vllm:generation_tokens_total"))
    assert counters.parse_counters(text) == {"vllm:iteration_tokens_total_count": 8.0, **nulls}
    assert (total([]), mean([]), mean([1.0, math.nan])) == (None, None, None)


def test_the_cache_settings_are_read_in_any_order_of_labels() -> None:
    text = 'vllm:a_total 1\nvllm:cache_config_info{x="a,block_size=",num_gpu_blocks="9000" , block_size="16"} 1.0 99\n'
    assert counters.parse_counters(text) == {
        "vllm:a_total": 1.0, f"{counters.CACHE_INFO} block_size": 16.0, f"{counters.CACHE_INFO} num_gpu_blocks": 9000.0,
    }  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet='am_{}"\\,= \t#\n1.e+-NaIf:', max_size=60))
def test_any_text_is_survived(text: str) -> None:
    list(read_samples(text))


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.from_regex(r"[a-z_:][a-z0-9_:]{0,6}", fullmatch=True),
            st.dictionaries(st.from_regex(r"[a-z_][a-z0-9_]{0,4}", fullmatch=True), st.text(max_size=6), max_size=3),
            st.floats(),
            st.none() | st.integers(0, 2**53),
        ),
        max_size=6,
    )
)
def test_what_was_written_is_read(series) -> None:
    lines = []
    for name, labels, value, stamp in series:
        escaped = [
            '{}="{}"'.format(k, v.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\""))
            for k, v in labels.items()
        ]
        written = {math.inf: "+Inf", -math.inf: "-Inf"}.get(value, repr(value))
        lines.append(f"{name}{{{','.join(escaped)}}} {written}" + ("" if stamp is None else f" {stamp}"))
    found = list(read_samples("\n".join(lines)))
    assert [(s.name, s.labels, repr(s.value)) for s in found] == [(n, k, repr(v)) for n, k, v, _ in series]
