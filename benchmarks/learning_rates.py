"""Does a fixed norm widen the range of learning rates that train?

Trains the language model of `notebooks/train_lm.py` under each regime, at each of some learning
rates, from each of some seeds, and compares the losses on held-out text. All runs of a regime
share one compiled program. Results go to a JSON file after each run, so that a run that is
stopped keeps what it has; `--minutes` stops by itself before a run that would not end in time.

    PYTHONPATH=. python benchmarks/learning_rates.py --out learning_rates.json

A rate trains if its loss, the mean over seeds, is at most `WITHIN` above the best of its
regime. The range is the factor between the largest and the smallest of these rates, beside the
best and connected with it.
"""

import argparse
import itertools
import json
import math
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from notebooks import train_lm

WAYS = {
    "adamw": {"regime": "adamw"},
    "ngpt": {"regime": "ngpt"},
    "hyperball, Adam": {"regime": "hyperball", "inner": "adam"},
    "hyperball, Muon": {"regime": "hyperball", "inner": "muon"},
}
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
WITHIN = 0.1
"""In nats a byte, beside the 5.5 of bytes that are all as likely."""


def trains(losses: dict[float, float]) -> list[float]:
    """The rates around the best one whose losses are close to its own."""
    rates = sorted(losses)
    best = min(rates, key=lambda rate: losses[rate] if losses[rate] < math.inf else math.inf)
    close = [losses[rate] <= losses[best] + WITHIN for rate in rates]
    first = last = rates.index(best)
    while first > 0 and close[first - 1]:
        first -= 1
    while last + 1 < len(rates) and close[last + 1]:
        last += 1
    return rates[first : last + 1]


def table(runs: list[dict[str, Any]]) -> str:
    """A row for each regime: the mean over seeds at each rate, and the range that trains."""
    rates = sorted({run["learning_rate"] for run in runs})
    lines = [f"{'':16}" + "".join(f"{rate:>16g}" for rate in rates) + "  range"]
    for way in dict.fromkeys(run["way"] for run in runs):
        cells, means = [], {}
        for rate in rates:
            own = [r["held_out"] for r in runs if (r["way"], r["learning_rate"]) == (way, rate)]
            finite = [math.inf if x is None else x for x in own]
            if own:
                means[rate] = float(np.mean(finite))
                spread = max(finite) - min(finite) if means[rate] < math.inf else math.nan
                cells.append(f"{means[rate]:9.4f} ±{spread / 2:.4f}")
            else:
                cells.append("")
        good = trains(means)
        width = f"{good[0]:g} to {good[-1]:g}: x{good[-1] / good[0]:.0f}"
        lines.append(f"{way:16}" + "".join(f"{cell:>16}" for cell in cells) + f"  {width}")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("learning_rates.json"))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--rates", nargs="+", type=float, default=RATES)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=math.inf, help="no run ends later")
    sizes = ("batch", "context", "width", "layers", "heads")
    for name in sizes:
        parser.add_argument(f"--{name}", type=int, default=getattr(train_lm.Config, name))
    options = parser.parse_args()

    def config_of(way):
        return train_lm.Config(**WAYS[way], **{name: getattr(options, name) for name in sizes})

    def run(way, rate, seed, steps):
        config, before = config_of(way), time.perf_counter()
        result = train_lm.train(
            config,
            train_lm.mesh_of("1x1", config),
            steps=steps,
            learning_rate=rate,
            seed=seed,
            log_every=math.ceil(steps / 20),
            progress=False,
        )
        return {
            "way": way,
            "learning_rate": rate,
            "seed": seed,
            "seconds": time.perf_counter() - before,
            "held_out": result.held_out,
            "losses": result.losses,
        }

    began, runs = time.perf_counter(), []
    train_lm.text()
    with ThreadPoolExecutor() as pool:  # compiles all at once
        list(pool.map(lambda way: run(way, 0.0, 0, 1), options.ways))
    print(f"compiled in {time.perf_counter() - began:.0f} s", flush=True)
    about = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    about |= {name: getattr(options, name) for name in ("steps", *sizes)}
    took = 0.0
    # Seeds last: what is stopped early has each rate.
    for seed, rate, way in itertools.product(range(options.seeds), options.rates, options.ways):
        if time.perf_counter() - began + 1.2 * took > 60 * options.minutes:
            break
        runs.append(finite(run(way, rate, seed, options.steps)))
        took = max(took, runs[-1]["seconds"])
        shown = {key: value for key, value in runs[-1].items() if key != "losses"}
        print(json.dumps(shown), flush=True)
        options.out.write_text(json.dumps({"settings": about, "runs": runs}))
    print(table(runs))


def finite(x: Any) -> Any:
    """The same with None in place of what JSON has no number for."""
    if isinstance(x, dict):
        return {key: finite(value) for key, value in x.items()}
    return None if isinstance(x, float) and not math.isfinite(x) else x


if __name__ == "__main__":
    main()
