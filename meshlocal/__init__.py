"""Traffic that stays on its node: discovery server, sidecar proxy and library on Trio.

The library's names are imported when they are first used: to import meshlocal costs and does nothing, and the sidecar
carries no library in its memory. HTTP is in `meshlocal.httpx`, what tests need in `meshlocal.testing`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0.dev0"

if TYPE_CHECKING:
    from meshlocal.client.feed import Feed, FeedStatus, SnapshotSink
    from meshlocal.client.statistics import AttemptOutcome, Outcome, RequestKey
    from meshlocal.library.errors import (
        Attempt,
        AttemptsFailedError,
        CallError,
        DeadlineError,
        LimitedError,
        MeshClosedError,
        MeshConfigError,
        MeshError,
        NoInstanceError,
        NotTrioError,
        ServiceError,
        TooManyServicesError,
    )
    from meshlocal.library.mesh import InstanceSource, Mesh, ServiceWatch, open_mesh
    from meshlocal.library.views import MeshStatistics, PlanStep, ServicePlan, ServiceStatistics
    from meshlocal.policy.config import AttemptOverrides, AttemptPolicy, ServiceConfig
    from meshlocal.policy.config_health import EjectionConfig, LimitsConfig
    from meshlocal.policy.locality import LeftOut
    from meshlocal.policy.model import (
        Conditions,
        EndpointKey,
        Instance,
        ModelError,
        ServiceKey,
        ServiceSnapshot,
        make_instance,
    )
    from meshlocal.policy.picker import Reason
    from meshlocal.wire.grpc.status import StatusCode

__all__ = [
    "Attempt",
    "AttemptOutcome",
    "AttemptOverrides",
    "AttemptPolicy",
    "AttemptsFailedError",
    "CallError",
    "Conditions",
    "DeadlineError",
    "EjectionConfig",
    "EndpointKey",
    "Feed",
    "FeedStatus",
    "Instance",
    "InstanceSource",
    "LeftOut",
    "LimitedError",
    "LimitsConfig",
    "Mesh",
    "MeshClosedError",
    "MeshConfigError",
    "MeshError",
    "MeshStatistics",
    "ModelError",
    "NoInstanceError",
    "NotTrioError",
    "Outcome",
    "PlanStep",
    "Reason",
    "RequestKey",
    "ServiceConfig",
    "ServiceError",
    "ServiceKey",
    "ServicePlan",
    "ServiceSnapshot",
    "ServiceStatistics",
    "ServiceWatch",
    "SnapshotSink",
    "StatusCode",
    "TooManyServicesError",
    "make_instance",
    "open_mesh",
]

_MODULES = {
    "meshlocal.client.feed": "Feed FeedStatus SnapshotSink",
    "meshlocal.client.statistics": "AttemptOutcome Outcome RequestKey",
    "meshlocal.library.errors": (
        "Attempt AttemptsFailedError CallError DeadlineError LimitedError MeshClosedError MeshConfigError"
        " MeshError NoInstanceError NotTrioError ServiceError TooManyServicesError"
    ),
    "meshlocal.library.mesh": "InstanceSource Mesh ServiceWatch open_mesh",
    "meshlocal.library.views": "MeshStatistics PlanStep ServicePlan ServiceStatistics",
    "meshlocal.policy.config": "AttemptOverrides AttemptPolicy ServiceConfig",
    "meshlocal.policy.config_health": "EjectionConfig LimitsConfig",
    "meshlocal.policy.locality": "LeftOut",
    "meshlocal.policy.model": "Conditions EndpointKey Instance ModelError ServiceKey ServiceSnapshot make_instance",
    "meshlocal.policy.picker": "Reason",
    "meshlocal.wire.grpc.status": "StatusCode",
}


if not TYPE_CHECKING:  # a type checker would take every misspelled name for one of these

    def __getattr__(name: str) -> object:
        import importlib

        for module, names in _MODULES.items():
            if name in names.split():
                value: object = getattr(importlib.import_module(module), name)
                globals()[name] = value
                return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
