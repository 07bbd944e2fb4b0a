"""The long form of the campaign: `python -m nursery_tests.campaign --help`."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import trio

from nursery_tests.campaign.campaign import Row
from nursery_tests.campaign.groups import GROUPS, SEED, lacks, try_group
from nursery_tests.campaign.report import put, table

DOCUMENT = Path(__file__).resolve().parent.parent.parent / "docs" / "reliability.md"
LONGEST = 600.0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m nursery_tests.campaign", description="Try every fault under load.")
    parser.add_argument("--seconds", type=float, default=10.0, help=f"each fault lasts, {LONGEST:g} at most [10]")
    parser.add_argument("--group", choices=sorted(GROUPS), action="append", help="only these faults [all]")
    parser.add_argument("--only", default="", help="only faults whose names contain this")
    parser.add_argument("--seed", type=int, default=SEED, help=f"of what is left to chance [{SEED}]")
    parser.add_argument("--document", action="store_true", help="write the table into docs/reliability.md")
    asked = parser.parse_args()
    seconds = min(asked.seconds, LONGEST)
    rows: list[Row] = []
    failed = False
    for name in asked.group or GROUPS:
        if why := lacks(GROUPS[name]):
            print(f"{name}: {why}", file=sys.stderr, flush=True)
            failed = True
            continue
        with tempfile.TemporaryDirectory(prefix="meshlocal-campaign-") as folder:
            found = trio.run(try_group, GROUPS[name], Path(folder), seconds, asked.only, asked.seed)
        print(table(found), flush=True)
        for row in found:
            for problem in row.problems:
                print(f"{row.fault.name}: {problem}", file=sys.stderr, flush=True)
        rows += found
    failed = failed or any(row.problems for row in rows)
    if asked.document and not failed:
        DOCUMENT.write_text(put(DOCUMENT.read_text(), table(rows)))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
