"""Imported by every Python process of a guarded command: an address outside this machine is refused and written down.

``NETWORK_RECORD`` names the file. So is every port that is listened on; where ``NETWORK_LISTENS`` is set, one on
loopback is not refused.
"""

import ipaddress
import json
import os
import socket
import sys

_RECORD = os.environ["NETWORK_RECORD"]
_LISTENS = bool(os.environ.get("NETWORK_LISTENS"))
_INTERNET = (socket.AF_INET, socket.AF_INET6)
_ADDRESSED = {"socket.connect": 1, "socket.sendto": 1, "socket.sendmsg": 1, "socket.bind": 1}
_NAMED = ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr")


def _loopback(host):
    if host in (None, "", "localhost", b"localhost"):
        return host not in ("", b"")
    try:
        return ipaddress.ip_address(host.decode() if isinstance(host, bytes) else host).is_loopback
    except ValueError:
        return False


def _hook(event, arguments):
    if event in _ADDRESSED:
        at, address = arguments[0], arguments[_ADDRESSED[event]]
        if getattr(at, "family", None) not in _INTERNET or not isinstance(address, tuple):
            return
        host = address[0]
    elif event in _NAMED:
        host = arguments[0]
    else:
        return
    if not _loopback(host):
        _note(event, host)
        raise PermissionError(f"blocked by the test: {event} {host}")


def _note(event, host):
    with open(_RECORD, "a", encoding="utf-8") as record:  # noqa: PTH123 — before anything but the interpreter is there
        record.write(json.dumps({"event": event, "host": str(host), "loopback": _loopback(host)}) + "\n")


_listen = socket.socket.listen


def _refused(self, *backlog):
    """There is no audit event for it; binding a loopback address alone, as urllib3 does to try IPv6, opens no port."""
    if self.family in _INTERNET:
        _note("socket.listen", self.getsockname()[0])
        if not _LISTENS:
            raise PermissionError("blocked by the test: socket.listen")
    return _listen(self, *backlog)


socket.socket.listen = _refused
sys.addaudithook(_hook)
