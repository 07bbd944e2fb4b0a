"""The whole comparison: TCP, a cache, HTTP, gRPC, TLS, the library, failover, snapshots, in one run. `make bench`."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from bench import cache, grpc, http, load, locality, page, peers, plots, report, rounds, tcp, tls, update
from bench.machine import ROOT, describe, describe_line, raise_file_limit
from bench.rounds import OURS, REFERENCE, Measured, Row

IMAGES = ROOT / "docs" / "images"
_OTHERS = ("HAProxy", "nginx", REFERENCE)

PARTS = ("tcp", "cache", "http", "grpc", "tls", "library", "failover", "update")
"""What is measured."""

_KEPT = ("cache-1", "cache-50", "cache-50-16")

Goals = list[dict[str, Any]]


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one round of less: 3 minutes instead of 15")
    parser.add_argument("--rounds", type=int, help="interleaved rounds [5; quick: 1]")
    parser.add_argument("--only", choices=PARTS, action="append", help="only these")
    parser.add_argument("--output", type=Path, default=report.RESULTS, help="folder of the JSON file")
    parser.add_argument("--document", action="store_true", help="put the figures and plots into docs/performance.md")
    parser.add_argument("--render", type=Path, metavar="JSON", help="measure nothing; show a run that was kept")
    asked = parser.parse_args()
    quick = asked.quick
    asked.rounds = asked.rounds or (1 if quick else 5)
    asked.seconds = 1
    asked.connects = 150 if quick else 400
    asked.rate_seconds = 1.0 if quick else 2.0
    asked.storm_seconds = 0.4 if quick else 2.0
    asked.idle = 500 if quick else peers.WANTED_CONNECTIONS
    asked.failovers = 1 if quick else 5
    asked.phase = 1.0 if quick else 1.5
    asked.rate = 400
    return asked


def measure(asked: argparse.Namespace) -> dict[str, Any]:
    """Run what was asked for."""
    only = asked.only or PARTS
    figures: dict[str, Any] = {"quick": asked.quick, "rounds": asked.rounds, "versions": load.versions(peers.envoy())}
    start = time.monotonic()
    checks = []
    if "tcp" in only:
        figures["tcp"] = tcp.measure(asked)
        checks += tcp.checks(asked)
    if "cache" in only:
        figures["cache"] = cache.measure(asked)
    if "http" in only:
        figures["http"] = http.measure(asked)
        checks += http.checks(asked)
    if "grpc" in only:
        figures["grpc"] = grpc.measure(asked)
    if "tls" in only:
        figures["tls"] = tls.measure(asked)
    if "library" in only:
        # Imported here: it takes httpx, which nothing else here does.
        from bench import library

        sizes = argparse.Namespace(rounds=3 if asked.quick else 15, count=50 if asked.quick else 150)
        figures["library"] = library.run(sizes)
    figures["checks"] = checks
    if "failover" in only:
        figures["failover"] = locality.failover(asked)
    if "update" in only:
        figures["update"] = update.measure(10000, 1 if asked.quick else 3, 3.0)
    figures["seconds"] = round(time.monotonic() - start)
    return figures


def tables(figures: dict[str, Any]) -> str:
    """Everything but the goals, in Markdown."""
    parts = []
    for title, name, rows in (
        ("TCP", "tcp", tcp.ROWS),
        ("Redis", "cache", cache.ROWS),
        ("HTTP/1.1", "http", http.ROWS),
        ("gRPC", "grpc", grpc.ROWS),
        ("TLS", "tls", tls.ROWS),
    ):
        if figures.get(name):
            parts.append(rounds.compare(title, figures[name], rows))
            parts += [f"{line}\n" for line in rounds.errors({**figures[name], "storm": {}})]
    if figures.get("library"):
        from bench import library

        parts.append(library.tables(figures["library"]))
    if figures.get("failover"):
        parts.append(locality.failover_table(figures["failover"]))
    if figures.get("update"):
        parts.append(update.table(figures["update"]))
    if figures["checks"]:
        parts.append(
            "Load and upstreams, with no proxy between:\n\n" + "".join(f"- {line}\n" for line in figures["checks"])
        )
    return "\n".join(parts)


def goals(figures: dict[str, Any]) -> Goals:
    """What of the project's goals holds in this run; prints it."""
    found: Goals = []
    measured: Measured = {}
    for part in ("tcp", "cache", "http", "grpc"):
        measured |= figures.get(part, {})
    wanted = [
        ("64 B, 1 connection, p50", Row("", "echo-64-1", "p50", "", 1), 0.9, False),
        ("64 B, 32 connections, throughput", Row("", "echo-64-32", "rate", "", 1), 1.3, True),
        ("64 KiB, 1 connection, p50", Row("", "echo-65536-1", "p50", "", 1), 0.9, False),
        ("64 KiB, 32 connections, p50", Row("", "echo-65536-32", "p50", "", 1), 0.9, False),
        ("connect, exchange, close, p50", Row("", "connect", "p50", "", 1), 1.1, False),
        ("connect, exchange, close, CPU", Row("", "connect", "cpu_per_request", "", 1), 1.0, False),
        ("connect, GET, close, 20 clients at once, rate", Row("", "cache-fresh-20", "rate", "", 1), 1.0, True),
        ("connect, GET, close, 100 clients at once, rate", Row("", "cache-fresh-100", "rate", "", 1), 1.0, True),
        ("memory, idle", Row("", "memory", "idle", "", 1), 0.6, False),
        ("memory per idle connection", Row("", "memory", "each", "", 1), 0.7, False),
        ("HTTP, 32 connections, throughput", Row("", "http-32", "rate", "", 1), 1.2, True),
        ("HTTP, 1 connection, p50", Row("", "http-1", "p50", "", 1), 0.6, False),
        ("gRPC, 1 connection, 1 call at once, p50", Row("", "grpc-1-1", "p50", "", 1), 0.6, False),
        ("gRPC, 1 connection, 32 at once, throughput", Row("", "grpc-1-32", "rate", "", 1), 1.5, True),
        ("gRPC, 32 connections, 8 at once, throughput", Row("", "grpc-32-8", "rate", "", 1), 2.0, True),
        ("gRPC, CPU of a call, 1 connection, 32 at once", Row("", "grpc-1-32", "cpu_per_request", "", 1), 0.7, False),
    ]
    secured = [
        ("TLS to the client, 64 B, 1 connection, p50", Row("", "terminated-64-1", "p50", "", 1), 1.0, False),
        ("mutual TLS onward too, 64 B, 1 connection, p50", Row("", "mutual-64-1", "p50", "", 1), 1.0, False),
        ("full handshakes a second", Row("", "handshakes", "rate", "", 1), 0.5, True),
        ("resumed handshakes a second", Row("", "resumed", "rate", "", 1), 0.5, True),
    ]
    of_best = [
        ("HTTP, 32 connections, throughput", Row("", "http-32", "rate", "", 1, more=True), 0.85),
        ("HTTP, 1 connection, p50", Row("", "http-1", "p50", "", 1), 1.0),
        ("connect, exchange, close, p50", Row("", "connect", "p50", "", 1), 1.35),
    ]
    for figures_of, rows in ((measured, wanted), (figures.get("tls", {}), secured)):
        for title, row, limit, more in rows:
            relative = rounds.ratio(figures_of, row, OURS, REFERENCE)
            if relative is not None:
                found.append(report.verdict(f"{title}, as a ratio to {REFERENCE}'s", relative, limit, at_least=more))
    for title, row, limit in of_best:
        against = [each for name in _OTHERS if (each := rounds.ratio(measured, row, OURS, name)) is not None]
        if against:
            worst = min(against) if row.more else max(against)
            found.append(report.verdict(f"{title}, as a ratio to the best peer's", worst, limit, at_least=row.more))
    if lost := rounds.values(measured, "storm", OURS, "errors"):
        found.append(report.verdict(f"{tcp.STORM:,} connections a second: lost", lost[0], 0))
    if figures.get("library"):
        from bench import library

        found += library.goals(figures["library"])
    if OURS in figures.get("failover", {}).get("rounds", {}):
        found += locality.goals(figures["failover"])
    if figures.get("update"):
        found += update.goals(figures["update"])
    found += _standing(figures.get("tcp", {}))
    kept = [row for row in cache.ROWS if row.workload in _KEPT] if figures.get("cache") else []
    kept = [row for row in kept if rounds.ratio(measured, row, OURS, REFERENCE) is not None]
    if kept:
        as_envoy = sum(_no_worse(measured, row, [REFERENCE]) for row in kept)
        title = f"Redis, established connections: rows of {len(kept)} at least as good as {REFERENCE}'s"
        found.append(report.verdict(title, as_envoy, len(kept), at_least=True))
    return found


def _standing(measured: Measured) -> Goals:
    """In how many rows of TCP meshlocal is at least as good as Envoy, and as the best of the three."""
    rows = [row for row in tcp.ROWS if rounds.ratio(measured, row, OURS, REFERENCE) is not None]
    if not rows:
        return []
    as_envoy = sum(_no_worse(measured, row, [REFERENCE]) for row in rows)
    as_best = sum(_no_worse(measured, row, _OTHERS) for row in rows)
    return [
        report.verdict(
            f"TCP rows of {len(rows)} at least as good as {REFERENCE}'s", as_envoy, len(rows), at_least=True
        ),
        report.verdict(
            f"TCP rows of {len(rows)} at least as good as the best's", as_best, len(rows) // 2 + 1, at_least=True
        ),
    ]


def _no_worse(measured: Measured, row: Row, others: tuple[str, ...] | list[str]) -> bool:
    found = [relative for name in others if (relative := rounds.ratio(measured, row, OURS, name)) is not None]
    return all(relative >= 1 if row.more else relative <= 1 for relative in found)


def name_of(only: list[str] | None) -> str:
    """What a run is kept as: one of a part does not take the place of one of the whole."""
    return "-".join(["compare", *(part for part in PARTS if part in only)] if only else ["compare"])


def document(kept: dict[str, Any]) -> None:
    """Put a run's figures, goals and plots into the documentation; one of a part into a section of its own."""
    machine = kept["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in kept["versions"].items())
    minutes = kept["seconds"] / 60
    text = (
        f"{describe_line(machine)}. {versions}. {kept['rounds']} rounds, {minutes:.0f} minutes, {kept['at'][:10]}.\n\n"
    )
    text += tables(kept)
    judged = page.verdicts(kept["goals"])
    if kept["benchmark"] != "compare":
        page.write({kept["benchmark"]: f"{judged}\n{text}"})
        return
    page.write({"goals": judged, "figures": text})
    if lacking := plots.missing():
        print(f"without plots: {lacking}")
        return
    for path in plots.draw(kept.get("tcp", {}), kept.get("http", {}), kept.get("failover", {}), IMAGES):
        print(f"wrote {path}")


def main() -> None:
    asked = options()
    raise_file_limit()
    kept = json.loads(asked.render.read_text()) if asked.render is not None else {"machine": describe()}
    report.heading("Side by side", kept["machine"])
    if asked.render is None:
        kept |= measure(asked)
    print("\n" + tables(kept))
    kept["goals"] = goals(kept)
    if asked.render is None:
        report.write(name_of(asked.only), kept["machine"], kept, asked.output)
    if asked.document:
        document(kept)


if __name__ == "__main__":
    main()
