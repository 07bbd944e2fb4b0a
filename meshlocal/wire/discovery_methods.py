"""The methods of the Discovery service, typed."""

from __future__ import annotations

from meshlocal.wire.grpc.method import Method
from meshlocal.wire.pb import discovery_pb2 as pb

SERVICE_NAME = "meshlocal.discovery.v1.Discovery"

LIST_ZONES = Method(f"/{SERVICE_NAME}/ListZones", pb.ListZonesRequest, pb.ListZonesResponse)
LIST_CLUSTERS = Method(f"/{SERVICE_NAME}/ListClusters", pb.ListClustersRequest, pb.ListClustersResponse)
LIST_SERVICES = Method(f"/{SERVICE_NAME}/ListServices", pb.ListServicesRequest, pb.ListServicesResponse)
LIST_INSTANCES = Method(f"/{SERVICE_NAME}/ListInstances", pb.ListInstancesRequest, pb.ListInstancesResponse)
WATCH_INSTANCES = Method(
    f"/{SERVICE_NAME}/WatchInstances",
    pb.WatchInstancesRequest,
    pb.WatchInstancesResponse,
    server_streaming=True,
)
WATCH_SERVICES = Method(
    f"/{SERVICE_NAME}/WatchServices", pb.WatchServicesRequest, pb.WatchServicesResponse, server_streaming=True
)
LIST_WATCHERS = Method(f"/{SERVICE_NAME}/ListWatchers", pb.ListWatchersRequest, pb.ListWatchersResponse)
METHODS = (LIST_ZONES, LIST_CLUSTERS, LIST_SERVICES, LIST_INSTANCES, WATCH_INSTANCES, WATCH_SERVICES, LIST_WATCHERS)
