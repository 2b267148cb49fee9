"""The text endpoint under a growing load: texts arrive at random moments, whether or not earlier ones have ended.

Clients that wait for their answer before they ask again would slow down with the endpoint and hide what a queue costs.
Here arrivals follow a Poisson process of a given rate, and times count from the moment of arrival. Rates are shares of
the endpoint's capacity, which four clients measure first. Clients and the endpoint share the machine's cores. Rows of
the other settings of `--max-waiting` stay in the record.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.report import Report
from benchmarks.rows import Figure, Row, Target
from benchmarks.suites.serving_text import PROMPT, Stream, stream
from ibnorm_export import models
from ibnorm_export.artifacts.tokenizer import write_byte_tokenizer
from ibnorm_export.cli.demo_app.configs import CONFIGS
from ibnorm_export.exporter.genai import export_genai
from ibnorm_export.generation.sampling import Sampling
from ibnorm_export.generation.text_model import open_folder
from tests.support.running_server import running

#: Offered load, as shares of the capacity.
SHARES = (0.1, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
#: Clients that measure the capacity, each of which asks again as soon as it has its text.
BUSY_CLIENTS = 4
PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Arrival:
    """One text: its answer, and the seconds from its arrival until the request was sent."""

    answer: Stream
    late_s: float


def make_model(folder: Path) -> Path:
    """A folder for GenAI with the shapes of the demo's LLaMA and random weights."""
    checkpoint = folder / "llama"
    models.save(models.new_model(*CONFIGS["llama"]), checkpoint)
    write_byte_tokenizer(checkpoint)
    export_genai(models.load(checkpoint, task="text-generation"), folder / "text")
    return folder / "text"


async def capacity(endpoint: str, tokens: int, *, seconds: float) -> float:
    """Texts per second while `BUSY_CLIENTS` clients ask without a pause."""
    end = time.perf_counter() + seconds

    async def client() -> int:
        texts = 0
        while time.perf_counter() < end:
            texts += (await stream(endpoint, tokens)).status == 200
        return texts

    began = time.perf_counter()
    texts = sum(await asyncio.gather(*(client() for _ in range(BUSY_CLIENTS))))
    return texts / (time.perf_counter() - began)


async def offer(endpoint: str, tokens: int, *, rate: float, seconds: float, seed: int) -> tuple[list[Arrival], float]:
    """Offer `rate` texts per second for `seconds`.

    Returns:
        The arrivals, and the seconds until the last answer has ended.
    """
    gaps = np.random.default_rng(seed).exponential(1.0 / rate, 20 + int(2 * rate * seconds))
    moments = np.cumsum(gaps) - gaps[0]
    began = time.perf_counter()

    async def ask(moment: float) -> Arrival:
        await asyncio.sleep(max(0.0, began + moment - time.perf_counter()))
        late = time.perf_counter() - began - moment
        return Arrival(await stream(endpoint, tokens), late)

    arrivals = await asyncio.gather(*(ask(float(moment)) for moment in moments[moments < seconds]))
    return arrivals, time.perf_counter() - began


def load_row(name: str, arrivals: Sequence[Arrival], *, rate: float, took_s: float, tokens: int, expected: str) -> Row:
    """What the clients of one load saw."""
    admitted = [one for one in arrivals if one.answer.status == 200]
    refused = sum(one.answer.status == 429 for one in arrivals)
    wrong = len(arrivals) - refused - sum(one.answer.text == expected for one in admitted)
    figures = {
        "offered": Figure(round(rate, 3), "texts/s"),
        "tokens per second": Figure(round(len(admitted) * tokens / took_s, 1), "tokens/s"),
        "refused": Figure(round(100.0 * refused / len(arrivals), 2), "%"),
        "neither right nor refused": Figure(wrong),
    }
    for title, values in (
        ("first token", [one.late_s + one.answer.first_s for one in admitted]),
        ("whole text", [one.late_s + one.answer.whole_s for one in admitted]),
    ):
        for percentile in PERCENTILES:
            value = float(np.percentile(values, percentile)) * 1e3
            figures[f"{title}, p{percentile}"] = Figure(round(value, 2), "ms")
    return Row(
        name,
        figures,
        targets=(Target("neither right nor refused", 0),),
        note=f"{len(admitted)} admitted, {refused} refused; sent at most "
        f"{max(one.late_s for one in arrivals) * 1e3:.1f} ms after their arrival",
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folder", type=Path, help="Folder for GenAI; the shapes of the demo's LLaMA without it.")
    parser.add_argument("--tokens", type=int, default=64, help="Tokens of each text.")
    parser.add_argument("--seconds", type=float, default=12.0, help="Duration of each load.")
    parser.add_argument("--max-waiting", type=int, help="Start the endpoint with this option.")


def measure(options: argparse.Namespace, report: Report) -> None:
    """Measure the capacity, then each load in turn."""
    setting = "no limit" if options.max_waiting is None else str(options.max_waiting)
    report.recorded = [row for row in report.recorded_rows() if row["details"]["max_waiting"] != setting]
    extra = () if options.max_waiting is None else ("--max-waiting", options.max_waiting)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or make_model(Path(scratch))
        expected = open_folder(folder).generate(PROMPT, Sampling(options.tokens)).text
        with running(folder, *extra) as server:
            asyncio.run(capacity(server.http, options.tokens, seconds=1.0))  # the first texts are slower
            most = asyncio.run(capacity(server.http, options.tokens, seconds=5.0))
            details = {"max_waiting": setting, "capacity": round(most, 3), "tokens": options.tokens}
            for index, share in enumerate(SHARES):
                arrivals, took_s = asyncio.run(
                    offer(server.http, options.tokens, rate=share * most, seconds=options.seconds, seed=index)
                )
                name = f"--max-waiting {setting}: {share:g} of the capacity"
                row = load_row(
                    name, arrivals, rate=share * most, took_s=took_s, tokens=options.tokens, expected=expected
                )
                report.add(Row(row.name, row.figures, targets=row.targets, note=row.note, details=details))
