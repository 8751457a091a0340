"""Figures and the arithmetic behind them: medians, quantiles, ratios, the lower bound of a mean.

A `Figure` is one line of a benchmark's output. `Report` prints each as soon as it is known and, for people, a
table of all of them at the end.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, median, stdev
from typing import Any, Final

_DIGITS = 6
"""Significant digits printed; more than any of the measurements has."""

_T_975: Final = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281, 2.2010, 2.1788, 2.1604,
    2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860, 2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555,
    2.0518, 2.0484, 2.0452, 2.0423,
)  # fmt: skip
"""Quantile 0.975 of Student's t for 1 to 30 degrees of freedom."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One measured figure.

    Attributes:
        bench: Which benchmark.
        case: What was measured: `pilotlight`, or a reference of the same run.
        metric: Name, with the unit last.
        value: Median of the measurements unless the metric's name says otherwise.
        unit: `us`, `ms`, `s`, `MB`, `1/s`, `count` or `ratio`.
        reference: Case that `ratio` compares with; None where there is nothing to compare.
        ratio: `value` by the reference's value; None also where that is not positive.
        n: How many measurements `value` is made of.
        spread: Smallest and largest of them.
    """

    bench: str
    case: str
    metric: str
    value: float
    unit: str
    reference: str | None = None
    ratio: float | None = None
    n: int = 1
    spread: tuple[float, float] | None = None

    def as_json(self) -> dict[str, Any]:
        """The figure's line, numbers rounded to what was measured."""
        return {
            "bench": self.bench,
            "case": self.case,
            "metric": self.metric,
            "value": _rounded(self.value),
            "unit": self.unit,
            "reference": self.reference,
            "ratio": None if self.ratio is None else _rounded(self.ratio),
            "n": self.n,
            "spread": None if self.spread is None else [_rounded(limit) for limit in self.spread],
        }


def figure(
    bench: str,
    case: str,
    metric: str,
    unit: str,
    samples: Sequence[float],
    *,
    value: float | None = None,
    reference: Figure | None = None,
) -> Figure:
    """The figure of these measurements.

    Args:
        bench: Which benchmark.
        case: What was measured.
        metric: Name of the figure.
        unit: Its unit.
        samples: The measurements, in any order; at least one.
        value: What to report; None takes the median.
        reference: The same metric of the case to compare with.
    """
    value = median(samples) if value is None else value
    return Figure(
        bench=bench,
        case=case,
        metric=metric,
        value=value,
        unit=unit,
        reference=reference.case if reference else None,
        ratio=value / reference.value if reference and reference.value > 0 else None,
        n=len(samples),
        spread=(min(samples), max(samples)),
    )


def quantile(samples: Iterable[float], share: float) -> float:
    """The value below which this share of the samples lies (nearest rank, as the load generators have it)."""
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def lower_bound_95(samples: Sequence[float]) -> float:
    """Lower end of the two-sided 95 % confidence interval of the mean (Student's t over the samples).

    Assumes that the samples are independent and roughly normal, which means of whole runs are. With a single
    sample nothing is known about their spread, and the bound is minus infinity.
    """
    if len(samples) < 2:
        return -math.inf
    return fmean(samples) - t_975(len(samples) - 1) * stdev(samples) / math.sqrt(len(samples))


def t_975(freedom: int) -> float:
    """Quantile 0.975 of Student's t; beyond the table by Fisher's expansion (error below 0.0001 there)."""
    if freedom <= len(_T_975):
        return _T_975[freedom - 1]
    z = NormalDist().inv_cdf(0.975)
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    )  # fmt: skip


class Report:
    """Collects and prints figures.

    Args:
        bench: Name of the benchmark.
        as_json: Print nothing but the lines.
    """

    def __init__(self, bench: str, *, as_json: bool) -> None:
        self.bench = bench
        self.figures: list[Figure] = []
        self._as_json = as_json

    def add(
        self,
        case: str,
        metric: str,
        unit: str,
        samples: Sequence[float],
        *,
        value: float | None = None,
        reference: Figure | None = None,
    ) -> Figure:
        """Print the figure of these measurements and return it; arguments as for `figure`."""
        made = figure(self.bench, case, metric, unit, samples, value=value, reference=reference)
        self.figures.append(made)
        sys.stdout.write(json.dumps(made.as_json()) + "\n")
        sys.stdout.flush()
        return made

    def close(self) -> None:
        """Show all figures as a table on standard error, where a person reads it and no program does."""
        if self._as_json:
            return
        from rich.console import Console  # noqa: PLC0415 - not needed with --json
        from rich.table import Table  # noqa: PLC0415

        table = Table(title=f"pilotlight bench {self.bench}", title_justify="left", box=None)
        table.add_column("case", no_wrap=True)
        table.add_column("metric", no_wrap=True)
        for name in ("value", "unit", "spread", "ratio", "n"):
            table.add_column(name, justify="right", no_wrap=True)
        for made in self.figures:
            low, high = made.spread or (made.value, made.value)
            table.add_row(
                made.case,
                made.metric,
                f"{made.value:.4g}",
                made.unit,
                f"{low:.3g} … {high:.3g}",
                "" if made.ratio is None else f"{made.ratio:.2f} of {made.reference}",
                str(made.n),
            )
        Console(stderr=True).print(table)


def _rounded(value: float) -> float:
    if not math.isfinite(value) or value == int(value):
        # JSON has no infinity; a bound that does not exist is printed as the largest number there is.
        return max(-sys.float_info.max, min(sys.float_info.max, value))
    return float(f"{value:.{_DIGITS}g}")
