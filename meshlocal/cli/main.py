"""The command line: arguments → config → run. Exit status 2: the input is at fault; 1: something else is."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, TypeVar

import click

import meshlocal
from meshlocal.policy.config_build import ConfigError, Role

if TYPE_CHECKING:
    from meshlocal.cli.instances import Output

F = TypeVar("F", bound=Callable[..., Any])

_OUTPUT_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO})
_LISTS = ("services", "instances", "nodes", "zones", "clusters", "proxies", "hot-nodes")
_DEFAULT_DISCOVERY = "grpc://127.0.0.1:7070"
_DEFAULT_ADMIN = "127.0.0.1:15000"


def _options(*options: Callable[[F], F]) -> Callable[[F], F]:
    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


_config_option = click.option(
    "--config", "config_file", type=click.Path(path_type=Path), help="YAML file; flags and environment win over it."
)
_log_options = _options(
    click.option("--log-level", help="debug, info, warning or error."),
    click.option("--log-format", help="auto (text on a terminal, else JSON), text or json."),
)
_place_options = _options(
    click.option("--node-name", help="The node that the proxy runs on. Default: the environment's NODE_NAME."),
    click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="A label of the proxy's own."),
    click.option("--prefer", metavar="KEY,…", help="Label keys, nearest tier first. Default: node."),
    click.option("--within", metavar="KEY", help="Use only instances that share this label's value."),
    click.option("--namespace", help="The namespace that a service name without a dot belongs to."),
)
_discovery_option = click.option(
    "--discovery",
    "urls",
    multiple=True,
    metavar="URL",
    help="file:PATH, or grpc://HOST:PORT (grpcs, ws, wss too; several: tried in turn).",
)
_credential_options = _options(
    click.option("--ca-file", metavar="PATH", help="Authorities that servers over TLS are checked by. [the system's]"),
    click.option("--token-file", metavar="PATH", help="A file with the token that servers want."),
)
_output_option = click.option(
    "-o",
    "--output",
    type=click.Choice(["table", "wide", "json", "yaml"]),
    default="table",
    help="For people (wide: with every column), or for machines.",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(meshlocal.__version__, message="meshlocal %(version)s")
def cli() -> None:
    """Keep traffic on its node: a discovery server and a sidecar proxy.

    Every key of the config file has an environment variable too: proxy.attempts.deadline is
    MESHLOCAL_PROXY__ATTEMPTS__DEADLINE.
    """


@cli.command()
@_discovery_option
@click.option(
    "--listen",
    multiple=True,
    metavar="URL",
    help="{tcp,http}://HOST:PORT=SERVICE, or http://HOST:PORT by host; port 0: any.",
)
@_place_options
@click.option("--admin", metavar="HOST:PORT", help="Health, metrics and views; none: nowhere. [127.0.0.1:15000]")
@click.option("--access-log/--no-access-log", default=None, help="One log line for each connection or HTTP request.")
@click.option("--workers", type=int, metavar="N", help="Processes that share the listeners. [1]")
@_config_option
@_log_options
def proxy(
    urls: tuple[str, ...],
    listen: tuple[str, ...],
    admin: str | None,
    access_log: bool | None,
    workers: int | None,
    config_file: Path | None,
    log_level: str | None,
    log_format: str | None,
    **place: Any,
) -> int:
    """Run the sidecar: forward connections to an instance on this node, else to another."""
    # Imported here, as in the other commands: none pays for what only another needs.
    from meshlocal.app.config_loader import load_config
    from meshlocal.app.run import run_proxy

    flags = {
        "proxy.discovery.urls": urls,
        "proxy.listen": listen,
        "proxy.admin": admin,
        "proxy.access_log": access_log,
        "proxy.workers": workers,
        "log.level": log_level,
        "log.format": log_format,
        **_place_flags(**place),
    }
    return run_proxy(partial(load_config, config_file, flags, os.environ, "proxy"))


@cli.command()
@click.option("--bind", multiple=True, metavar="HOST:PORT", help="Where to listen. [127.0.0.1:7070]")
@click.option("--websocket-bind", multiple=True, metavar="HOST:PORT", help="Where to serve WebSocket. [nowhere]")
@click.option(
    "--xds", "xds_bind", multiple=True, metavar="HOST:PORT", help="Where to serve xDS, for gRPC and Envoy. [nowhere]"
)
@click.option(
    "--source",
    "sources",
    multiple=True,
    metavar="URL",
    help="A registry: file:PATH, etcd:, dns:, kubernetes:, or meshlocal: and another server's URL.",
)
@click.option("--zone", help="The label zone of instances that come without one.")
@click.option("--cluster", help="The label cluster of instances that come without one.")
@click.option("--admin", metavar="HOST:PORT", help="Health, metrics and views; none: nowhere. [none]")
@_config_option
@_log_options
def discovery(
    bind: tuple[str, ...],
    websocket_bind: tuple[str, ...],
    xds_bind: tuple[str, ...],
    sources: tuple[str, ...],
    zone: str | None,
    cluster: str | None,
    admin: str | None,
    config_file: Path | None,
    log_level: str | None,
    log_format: str | None,
) -> int:
    """Run the discovery server: registries behind one interface, gRPC and WebSocket."""
    from meshlocal.app.config_loader import load_config
    from meshlocal.app.run import run_discovery

    flags = {
        "discovery.bind": bind,
        "discovery.websocket_bind": websocket_bind,
        "discovery.xds_bind": xds_bind,
        "discovery.sources": sources,
        "discovery.zone": zone,
        "discovery.cluster": cluster,
        "discovery.admin": admin,
        "log.level": log_level,
        "log.format": log_format,
    }
    return run_discovery(partial(load_config, config_file, flags, os.environ, "discovery"))


@cli.command()
@click.argument("what", type=click.Choice(["status", "detach"]))
@click.option("--pin", required=True, metavar="PATH", help="The folder that proxy.bypass.pin names.")
def bypass(what: str, pin: str) -> int:
    """Look at a bypass that is pinned, or take it away, with a proxy or without.

    status: where connects to each listener go, and how many went there. detach: they reach the proxy again; if one runs
    with it, it has no bypass until it is restarted.
    """
    from meshlocal.cli import bypass as pinned

    click.echo(pinned.status(pin) if what == "status" else pinned.detach(pin))
    return 0


@cli.command()
@click.argument("what", type=click.Choice(_LISTS))
@click.argument("service", required=False)
@click.option("-w", "--watch", is_flag=True, help="Go on with what is added, changed or removed: of one SERVICE.")
@_discovery_option
@_credential_options
@_config_option
@_output_option
def get(
    what: str,
    service: str | None,
    watch: bool,
    urls: tuple[str, ...],
    ca_file: str | None,
    token_file: str | None,
    config_file: Path | None,
    output: Output,
) -> int:
    """Ask discovery what it knows: services, nodes, zones, clusters, or instances, of all services or of one.

    proxies: who follows it, and what of; hot-nodes: where more proxies call a service than it has instances.
    """
    from meshlocal.cli import lookup

    if what != "instances" and service is not None:
        raise click.UsageError("only instances are those of a SERVICE")
    if watch and service is None:
        raise click.UsageError("--watch is for the instances of a SERVICE")
    config = _load(config_file, _discovery_flags(urls, ca_file, token_file))
    if watch and service is not None:
        lookup.watch(service, config, output, Random())
    click.echo(lookup.get(what, service, config, output))
    return 0


@cli.command()
@click.argument("service")
@_discovery_option
@_credential_options
@_place_options
@click.option("--port-name", help="Use only instances whose port has this name.")
@click.option(
    "--proxy",
    "proxy_admin",
    metavar="HOST:PORT",
    help="Ask a running proxy at its admin address instead; http://HOST:PORT is the same, https:// over TLS.",
)
@_config_option
@_output_option
def explain(
    service: str,
    urls: tuple[str, ...],
    ca_file: str | None,
    token_file: str | None,
    port_name: str | None,
    proxy_admin: str | None,
    config_file: Path | None,
    output: Output,
    **place: Any,
) -> int:
    """Show the order in which the next request tries SERVICE's instances, tier by tier, and why."""
    from meshlocal.cli import lookup

    if proxy_admin is not None:
        from meshlocal.cli.admin import Admin

        told, known = lookup.explain_running(service, Admin(proxy_admin, ca_file, token_file), output)
        click.echo(told)
        return 0 if known else 1
    flags = {**_discovery_flags(urls, ca_file, token_file), **_place_flags(**place)}
    if port_name is not None:
        flags["proxy.services"] = {service: {"port_name": port_name}}
    config = _load(config_file, flags)
    click.echo(lookup.explain(service, config, output))
    return 0


@cli.command()
@click.argument("service")
@click.option("--left", is_flag=True, help="Requests that left the first tier.")
@click.option("--failed", is_flag=True, help="Requests that failed, or an attempt of which did.")
@click.option(
    "--proxy",
    "proxy_admin",
    metavar="HOST:PORT",
    default=_DEFAULT_ADMIN,
    show_default=True,
    help="The proxy's admin address; http://HOST:PORT is the same, https:// over TLS.",
)
@_credential_options
@click.option(
    "-o", "--output", type=click.Choice(["text", "json"]), default="text", help="For people, or for machines."
)
def tap(
    service: str,
    left: bool,
    failed: bool,
    proxy_admin: str,
    ca_file: str | None,
    token_file: str | None,
    output: str,
) -> int:
    """Show SERVICE's requests at a running proxy as they end: where each went, and why.

    A line for each request or connection, with the attempts that failed before. Of a busy service some are shown, and
    how many were not is said. With --left and --failed, those that did either.
    """
    from meshlocal.cli.admin import Admin
    from meshlocal.cli.tap import tap as follow

    admin = Admin(proxy_admin, ca_file, token_file)
    for line in follow(admin, service, left=left, failed=failed, as_json=output == "json"):
        click.echo(line)
    return 0


@cli.command()
@click.argument("config_file", metavar="CONFIG", type=click.Path(path_type=Path))
@click.option(
    "--for",
    "part",
    type=click.Choice(["proxy", "discovery"]),
    help="What it is for. [whatever it has listeners or sources for]",
)
@click.option("--strict", is_flag=True, help="Exit with 1 if there are warnings.")
def check(config_file: Path, part: Role | None, strict: bool) -> int:
    """Read CONFIG, and the files that it names, as proxy and discovery do; start nothing.

    What is wrong is said with file, line and key (exit status 2). Warnings are of what is right and most likely not
    meant.
    """
    from meshlocal.app.checking import check as check_config

    parts, warnings = check_config(config_file, os.environ, (part,) if part is not None else ())
    for warning in warnings:
        click.echo(f"warning: {warning}")
    click.echo(f"{config_file} is good, for {' and '.join(parts)}; {len(warnings) or 'no'} warnings")
    return 1 if strict and warnings else 0


@cli.command()
@click.option("--registry", required=True, metavar="URL", help="etcd://HOST:PORT/PREFIX, with a source's options.")
@click.option("--service", required=True, metavar="NAME", help="Whose instance it is.")
@click.option("--port", required=True, type=click.IntRange(1, 65535), help="Where it listens.")
@click.option("--address", metavar="IP", help="Likewise. [this machine's towards etcd]")
@click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="A label of the instance.")
@click.option("--node-name", help="Its label node. [the environment's NODE_NAME]")
@click.option("--name", help="The last part of its key. [HOSTNAME-PORT]")
@click.option(
    "--health",
    type=click.Choice(["tcp", "http", "grpc", "none"]),
    default="tcp",
    help="How it is checked before it is registered, and from then on. [tcp]",
)
@click.option("--health-path", default="/", metavar="PATH", help="http: the target of the GET. [/]")
@click.option("--health-interval", type=click.FloatRange(0.1, 3600), default=2.0, help="Seconds between checks. [2]")
@click.option("--lease", type=click.IntRange(3, 3600), default=10, help="Seconds that it outlives this process. [10]")
@click.option("--drain", type=click.FloatRange(0, 3600), default=5.0, help="Seconds for clients to leave. [5]")
@click.option("--stop-timeout", type=click.FloatRange(0, 3600), default=30.0, help="Seconds for COMMAND to end. [30]")
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), default="info", help="[info]")
@click.option("--log-format", type=click.Choice(["auto", "text", "json"]), default="auto", help="[auto]")
@click.argument("command", nargs=-1)
def register(
    registry: str,
    service: str,
    port: int,
    address: str | None,
    labels: tuple[str, ...],
    node_name: str | None,
    name: str | None,
    health: str,
    health_path: str,
    health_interval: float,
    lease: int,
    drain: float,
    stop_timeout: float,
    log_level: str,
    log_format: str,
    command: tuple[str, ...],
) -> int:
    """Run COMMAND, and keep it registered in etcd while it works: for machines without an orchestrator.

    On SIGTERM it is marked as terminating, its clients have --drain seconds to leave, and it is stopped. Without
    COMMAND, what listens at address and port already is registered. The exit status is COMMAND's.
    """
    from meshlocal.app.registering import run_register

    return run_register(
        registry=registry,
        service=service,
        port=port,
        address=address,
        labels=_pairs(labels),
        node_name=node_name or os.environ.get("NODE_NAME", "").strip(),
        name=name,
        health=health,
        health_path=health_path,
        health_interval=health_interval,
        lease=lease,
        drain=drain,
        patience=stop_timeout,
        log_level=log_level,
        log_format=log_format,
        command=command,
    )


@cli.command()
@click.option("--seconds", type=click.FloatRange(0.2, 60), default=1.0, help="How long each act lasts.")
def demo(seconds: float) -> int:
    """Show local-first, failover and return, with everything in this terminal."""
    from meshlocal.app.demo import run_demo

    return run_demo(seconds)


def _discovery_flags(urls: tuple[str, ...], ca_file: str | None, token_file: str | None) -> dict[str, object]:
    return {
        "proxy.discovery.urls": urls,
        "proxy.discovery.ca_file": ca_file,
        "proxy.discovery.token_file": token_file,
    }


def _pairs(labels: Sequence[str]) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for label in labels:
        key, separator, value = label.partition("=")
        if not separator or not key:
            raise click.BadParameter(f"expected KEY=VALUE, got {label!r}", param_hint="--label")
        pairs[key] = value
    return pairs


def _place_flags(
    node_name: str | None, labels: Sequence[str], prefer: str | None, within: str | None, namespace: str | None
) -> dict[str, object]:
    return {
        "proxy.node_name": node_name,
        "proxy.labels": _pairs(labels) or None,
        "proxy.prefer": tuple(key.strip() for key in prefer.split(",")) if prefer is not None else None,
        "proxy.within": within,
        "proxy.namespace": namespace,
    }


def _load(config_file: Path | None, flags: dict[str, object]) -> Any:
    """The proxy's section of the config, with a discovery URL in any case."""
    from meshlocal.app.config_loader import load_config

    config = load_config(config_file, flags, os.environ).proxy
    if not config.discovery.urls:
        flags = {**flags, "proxy.discovery.urls": (_DEFAULT_DISCOVERY,)}
        config = load_config(config_file, flags, os.environ).proxy
    return config


def main() -> None:
    """Run the command line; what a user can put right ends with a line on stderr, not with a traceback."""
    _fill_standard_streams()
    try:
        status = cli.main(prog_name="meshlocal", standalone_mode=False)
    except click.exceptions.Abort:
        status = 130
    except BaseExceptionGroup as group:
        # Ctrl-C before signals are handled, as a nursery has it.
        if group.subgroup(KeyboardInterrupt) is None:
            raise
        status = 130
    except click.ClickException as error:
        with suppress(OSError):
            error.show()
        status = error.exit_code
    except ConfigError as error:
        status = _fail(error, 2)
    except BrokenPipeError:
        # Who read the output has gone; nothing may be written at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _OUTPUT_ERRNOS:
            error = OSError(f"cannot write the output: {os.strerror(error.errno).lower()}")
        elif not isinstance(error, _expected_errors()):
            raise
        status = _fail(error, 1)
    sys.exit(status)


def _fill_standard_streams() -> None:
    """Open what the parent closed of descriptors 0 to 2: a connection must not get a number that output goes to."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = sys.stdout or os.fdopen(1, "w")
    sys.stderr = sys.stderr or os.fdopen(2, "w")


def _expected_errors() -> tuple[type[Exception], ...]:
    from meshlocal.app.query import QueryError
    from meshlocal.net.listen import ListenError

    return ListenError, QueryError


def _fail(error: Exception, status: int) -> int:
    with suppress(OSError):
        for line in str(error).splitlines():
            click.echo(f"meshlocal: {line}", err=True)
    return status
