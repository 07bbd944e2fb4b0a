"""What the overview pages say of certificates, and of what is open beyond this machine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from meshlocal.app import html
from meshlocal.net.following import Followed
from meshlocal.net.tls import certificates, expiring
from meshlocal.net.wall_clock import utc_text, wall_clock
from meshlocal.policy.exposure import Exposure

if TYPE_CHECKING:
    from meshlocal.net.workload_api import WorkloadApi


def security_facts(
    followed: Iterable[Followed[Any]], workload: WorkloadApi | None, exposures: Iterable[Exposure]
) -> Iterator[tuple[str, Sequence[object]]]:
    """Rows of an overview; none where there is nothing to say.

    Args:
        followed: what is made of files, certificates among it.
        workload: the SPIFFE agent; None: there is none.
        exposures: what is open beyond this machine.
    """
    followed = list(followed)
    found = certificates(followed)
    if found:
        warned = list(expiring(followed, wall_clock()))
        ends = [f"{file}: until {utc_text(period.not_after)}" for file, period in found.items()]
        yield "own certificates", [html.bad("; ".join(warned)) if warned else "; ".join(ends)]
    if workload is not None:
        who = html.code(workload.svid.spiffe_id) if workload.svid is not None else html.bad("no certificate yet")
        state = html.good("connected") if workload.connected and not workload.problem else html.bad(workload.problem)
        yield "SPIFFE agent", [html.code(workload.path), who, state]
    told = [str(each) for each in exposures]
    if told:
        yield "open beyond this machine", [html.bad("; ".join(told))]
