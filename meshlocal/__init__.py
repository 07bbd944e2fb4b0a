"""Traffic that stays on its node: discovery server, sidecar proxy and library on Trio."""

__version__ = "0.1.0.dev0"
