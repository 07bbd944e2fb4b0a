"""What is logged, to be seen and to be changed while the process runs: `GET` and `PUT /log`."""

from __future__ import annotations

from meshlocal.admin.messages import Request, Response
from meshlocal.net.log import get_log, levels, set_level

LOG = "/log"

_log = get_log(__name__)


def log_page(request: Request) -> Response:
    """The levels in force. PUT changes one: `?level=debug` this package's own, `&logger=NAME` another's.

    It holds until the next change, or until the configuration is applied again.
    """
    if request.method == "PUT":
        level, logger = (next(iter(request.values(key)), "") for key in ("level", "logger"))
        try:
            set_level(level, logger)
        except ValueError as error:
            return Response.text(f"{error}; PUT {LOG}?level=LEVEL, and &logger=NAME for one logger alone", 400)
        _log.warning("log level changed", level=level.lower(), logger=logger or None)
    return Response.json(levels())
