"""Systems are told apart, and named, by label and address; a tier that the user named is called that."""

from __future__ import annotations

from dataclasses import replace

from run_files import SPEC, TIER, good, write_run

from harness.analysis.capacity.serving_config import serving_configs
from harness.analysis.capacity.system import hardware_of, system_of
from harness.analysis.compare.comparable import differences, refusals
from harness.analysis.report import run as report
from harness.analysis.report.compared import compare_runs
from harness.analysis.report.view import view_run
from harness.analysis.rows.read import read_run
from harness.analysis.summary import summarise


def found(path, port=1, label=None, engine="url", tier=TIER):
    spec = replace(SPEC, base_urls=[f"http://10.0.0.{port}:8000/v1"], slo={"ttft": 1.0})
    return read_run(write_run(path, [good(i) for i in range(60)], spec=spec, engine=engine, label=label, tier=tier))


def test_two_servers_with_one_model_are_two_systems(tmp_path):
    runs = [found(tmp_path / str(k), port=k) for k in (1, 2)]
    a, b = map(summarise, runs)
    assert hardware_of(a) != hardware_of(b) and system_of(a) != system_of(b)
    assert sorted(s.name for s in serving_configs([a, b])) == [
        "m on test.large (as stated by you) at 10.0.0.1:8000", "m on test.large (as stated by you) at 10.0.0.2:8000",
    ]  # fmt: skip
    assert ("servers", "http://10.0.0.1:8000/v1", "http://10.0.0.2:8000/v1") in [
        (d.name, d.a, d.b) for d in differences(a, b)
    ]
    assert any("A holds runs of different systems (servers differ)" in reason for reason in refusals([a, b], [a]))
    page = compare_runs([view_run(run, summarise(run), str(k)) for k, run in enumerate(runs)])
    names = {line.name for s in page.sections for chart in s.charts if s.id == "latency-load" for line in chart.lines}
    assert len(names) == 2 and all("10.0.0." in name for name in names)


def test_ports_of_servers_that_were_started_mean_nothing(tmp_path):
    a, b = (summarise(found(tmp_path / str(k), port=k, engine="vllm-cpu")) for k in (1, 2))
    assert hardware_of(a) == hardware_of(b)


def test_a_label_is_part_of_the_system_and_of_its_name(tmp_path):
    a, b = (summarise(found(tmp_path / name, label=name, engine="vllm-cpu")) for name in ("old", "new"))
    assert hardware_of(a) != hardware_of(b)
    assert {s.name for s in serving_configs([a, b])} == {"m on test.large [old]", "m on test.large [new]"}
    assert "[old]" in report.headline(a)
    assert [(d.name, d.a, d.b) for d in differences(a, b)] == [("label", "old", "new")]


def test_a_tier_that_was_stated_is_never_measured_hardware(tmp_path):
    """With --base-url --tier nobody looked at the hardware."""
    stated, started = found(tmp_path / "a"), found(tmp_path / "b", engine="vllm-cpu")
    s = summarise(stated)
    for text in (report.headline(s), report.render_markdown(s), str(view_run(stated, s).sections)):
        assert "as stated by you" in text
    assert "as stated by you" not in report.render_markdown(summarise(started))
    none = summarise(found(tmp_path / "c", tier=None))
    assert "as stated by you" not in report.headline(none)
