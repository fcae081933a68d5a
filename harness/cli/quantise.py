"""A smaller model from one that is there: harness quantise."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from harness.cli.output import say
from harness.cli.verb import ENVIRONMENT, command
from harness.errors import EXIT_VALID, UsageError
from harness.option_types import COUNT, PATH

if TYPE_CHECKING:
    from harness.audit.records import AuditedRecord

MOST_CALIBRATION = 512
"""Records that calibrate; more change little. Source: GPTQ (arXiv 2210.17323) takes 128."""


@command(
    epilog=f"""\b
Examples:
  harness quantise smollm2-135m --to int8 -o ./smollm2-int8
  harness quantise smollm2-135m --to int4 --group 32 -o ./smollm2-int4
  harness quantise smollm2-135m --to int8 --calibrate production.jsonl -o ./smollm2-gptq
  harness audit trace.jsonl --current smollm2-135m@aws-m7a.large --candidate ./smollm2-int8@aws-m7a.large ...

{ENVIRONMENT}"""
)
@click.argument("model")
@click.option("--to", type=click.Choice(["int8", "int4"]), required=True,
              help="int8: weights and activations (W8A8). int4: weights alone (W4A16).")  # fmt: skip
@click.option("-o", "--output", "--out", "out", type=PATH, required=True, help="The new folder.")
@click.option("--group", type=COUNT, envvar="HARNESS_QUANTISE_GROUP",
              help="int4: weights of a row that share a scale.  [default: 64]")  # fmt: skip
@click.option("--calibrate", type=PATH, metavar="TRACE",
              help="Write a recipe for GPTQ by llm-compressor instead, on whole sessions of TRACE.")  # fmt: skip
@click.option("--share", type=click.FloatRange(0, 1, min_open=True), default=0.25, show_default=True,
              help="Of the sessions of --calibrate, those that calibrate.")  # fmt: skip
@click.option("--seen", type=PATH, metavar="TRACE", multiple=True,
              help="Records that examples or the tuning of a prompt have used; no audit grades them.")  # fmt: skip
def quantise(
    model: str, to: str, out: Path, group: int | None, calibrate: Path | None, share: float, seen: Sequence[Path]
) -> int:
    """Write MODEL (a name of `harness models`, or a folder) with weights of 8 or 4 bits into a new folder, for vLLM.

    Each weight is rounded to the nearest value. That is the worst way there is to int8 or int4, and an audit says so:
    calibrated weights keep more. --calibrate writes what that needs: the texts, and a script for an environment of its
    own, since llm-compressor and vLLM cannot share one. Records that were used are written into the folder by their
    hash, and no audit of that model grades them, nor the rest of their sessions.
    """
    from harness.audit.records import prompt_sha256
    from harness.cluster.catalogue.models import get_model
    from harness.cluster.catalogue.quantise import quantise as made_of
    from harness.cluster.catalogue.quantise import steps
    from harness.cluster.catalogue.rounding import GROUP
    from harness.cluster.catalogue.weights import ensure_weights

    if to == "int8" and group is not None:
        raise UsageError("--group: int8 has one scale for each output channel")
    used = [prompt_sha256(record.source) for path in seen for record in _records(path)]
    texts = None
    if calibrate is not None:
        texts = [record.prompt for record in _drawn(_records(calibrate), share)]
        used += [prompt_sha256(record.source) for record in _drawn(_records(calibrate), share)]
    parent = get_model(model)
    group = group or (GROUP if to == "int4" else None)
    made = made_of(
        parent, ensure_weights(parent, say=say), out, "int8" if to == "int8" else "int4", group, used, texts=texts,
        say=say,
    )  # fmt: skip
    say(f"{out}: {made.words}" + (f"; {len(made.seen):,} records it has seen" if made.seen else ""))
    if texts is not None:
        say("now, in an environment of its own:\n  " + "\n  ".join(steps(out)))
    return EXIT_VALID


def _records(path: Path) -> list[AuditedRecord]:
    from harness.audit.records import read_records
    from harness.options import PlanOptions
    from harness.trace.io import open_asked

    return read_records(open_asked(path, PlanOptions()), None, None)


def _drawn(records: Sequence[AuditedRecord], share: float) -> list[AuditedRecord]:
    """Whole sessions, about ``share`` of them, drawn alike each time; at most `MOST_CALIBRATION` records."""
    import numpy as np

    sessions = np.random.default_rng(0).permutation(1 + max(record.session for record in records))
    taken = {int(one) for one in sessions[: max(1, round(share * len(sessions)))]}
    return [record for record in records if record.session in taken][:MOST_CALIBRATION]
