"""Plots of a run, as SVG files. Needs matplotlib, of the extra `bench`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from bench.rounds import Measured, contestants_of, values

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {"direct": "#888888", "HAProxy": "#1f77b4", "nginx": "#2ca02c", "Envoy": "#9467bd", "meshlocal": "#d62728"}
SHARES = ("p50", "p90", "p99", "p99.9")


def missing() -> str:
    """How to install what plots need; empty if it is there."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return "pip install matplotlib"
    return ""


def draw(tcp: Measured, http: Measured, failover: dict[str, Any], folder: Path) -> list[Path]:
    """Draw everything that was measured; returns the files."""
    import matplotlib

    matplotlib.use("svg")
    # The same figures give the same bytes.
    matplotlib.rcParams.update({"svg.hashsalt": "meshlocal", "font.size": 9, "svg.fonttype": "none"})
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    latency = [(tcp, f"rate-{rate}", f"64 B at {rate:,} exchanges a second") for rate in (1000, 5000)]
    files.append(_latencies(folder / "tcp-latency.svg", latency))
    sizes = [(tcp, f"echo-{size}", f"{name} echo") for size, name in ((64, "64 B"), (65536, "64 KiB"))]
    files.append(_throughputs(folder / "tcp-throughput.svg", sizes, (32, 256)))
    if http:
        files.append(_latencies(folder / "http-latency.svg", _http_rates(http)))
        files.append(_throughputs(folder / "http-throughput.svg", [(http, "http", "GET")], (1, 32, 256)))
    if failover:
        files.append(_failover(folder / "failover.svg", failover))
    return files


def _http_rates(http: Measured) -> list[tuple[Measured, str, str]]:
    rates = sorted(int(name.rpartition("-")[2]) for name in http if name.startswith("http-rate-"))
    return [(http, f"http-rate-{rate}", f"GET at {rate:,} a second") for rate in rates]


def _latencies(path: Path, panels: Sequence[tuple[Measured, str, str]]) -> Path:
    """Latency against percentile, on a scale of how rare it is."""

    def panel(axes: Axes, measured: Measured, workload: str) -> None:
        for name in contestants_of(measured):
            found = [values(measured, workload, name, share) for share in SHARES]
            if all(found):
                axes.plot(SHARES, [median(each) * 1e6 for each in found], "o-", label=name, color=COLOURS[name])
        axes.set_yscale("log")
        axes.set_ylabel("µs")
        axes.set_xlabel("percentile")

    return _save(path, panels, panel)


def _throughputs(path: Path, panels: Sequence[tuple[Measured, str, str]], counts: Sequence[int]) -> Path:
    """Throughput against connections, as bars side by side."""

    def panel(axes: Axes, measured: Measured, prefix: str) -> None:
        names = contestants_of(measured)
        width = 0.8 / len(names)
        for number, name in enumerate(names):
            rates = [values(measured, f"{prefix}-{count}", name, "rate") for count in counts]
            places = [at - 0.4 + width * (number + 0.5) for at in range(len(counts))]
            heights = [median(each) / 1000 if each else 0.0 for each in rates]
            axes.bar(places, heights, width, label=name, color=COLOURS[name])
        axes.set_xticks(range(len(counts)), [str(count) for count in counts])
        axes.set_xlabel("connections")
        axes.set_ylabel("1,000 a second")

    return _save(path, panels, panel)


def _failover(path: Path, figures: dict[str, Any]) -> Path:
    """The worst latency of each tenth of a second, in the round that was the median one."""
    styles = {name: "--" if "checks" in name and "Envoy" in name else "-" for name in figures["rounds"]}

    def panel(axes: Axes, rounds: dict[str, list[dict[str, Any]]], _: str) -> None:
        for name, found in rounds.items():
            chosen = sorted(found, key=lambda each: float(each["worst"]))[len(found) // 2]
            course = [latency * 1000 if latency else float("nan") for latency in chosen["course"]]
            step = 3 * figures["phase"] / len(course)
            times = [step * number for number in range(len(course))]
            label = f"{name}: {chosen['failed']} failed"
            colour = COLOURS[name.partition(",")[0]]
            axes.plot(times, course, styles[name], label=label, color=colour, linewidth=1.2)
        axes.axvspan(figures["phase"], 2 * figures["phase"], color="#eeeeee", zorder=0)
        axes.set_yscale("log")
        axes.set_xlabel("seconds; grey: the local instance is dead")
        axes.set_ylabel("worst of each 0.1 s, ms")

    return _save(path, [(figures["rounds"], "", "Connections during an outage of the local instance")], panel, 7.5)


def _save(path: Path, panels: Sequence[tuple[Any, str, str]], panel: Any, width: float = 4.0) -> Path:
    from matplotlib import pyplot

    figure, found = pyplot.subplots(1, len(panels), figsize=(width * len(panels), 3.2), squeeze=False)
    for axes, (measured, key, title) in zip(found[0], panels, strict=True):
        panel(axes, measured, key)
        axes.set_title(title)
        axes.grid(visible=True, axis="y", linewidth=0.3)
    found[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    return path
