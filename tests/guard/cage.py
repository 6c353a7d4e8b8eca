"""``unshare -rn python cage.py RECORD COMMAND…``: a command in a network of its own that leads nowhere.

The kernel counts for every process in it, whatever it is written in: packets that had no way out, and ports that were
listened on. Loopback works.
"""

from __future__ import annotations

import fcntl
import json
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

_GET_FLAGS, _SET_FLAGS, _UP = 0x8913, 0x8914, 1
_LISTENS = "0A"


def raise_loopback() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        asked = struct.pack("16sH14x", b"lo", 0)
        (flags,) = struct.unpack("16xH14x", fcntl.ioctl(any_socket, _GET_FLAGS, asked))
        fcntl.ioctl(any_socket, _SET_FLAGS, struct.pack("16sH14x", b"lo", flags | _UP))


def lost() -> int:
    """Packets and connections that found no way out since this network was made."""
    names, values = (line.split() for line in Path("/proc/net/snmp").read_text().splitlines() if line.startswith("Ip:"))
    six = dict(line.split() for line in Path("/proc/net/snmp6").read_text().splitlines())
    return int(values[names.index("OutNoRoutes")]) + int(six["Ip6OutNoRoutes"])


def listening() -> set[str]:
    """Addresses with ports, as the kernel writes them (IPv4 in reversed hexadecimal bytes)."""
    rows = [row.split() for kind in ("tcp", "tcp6") for row in Path(f"/proc/net/{kind}").read_text().splitlines()[1:]]
    return {row[1] for row in rows if row[3] == _LISTENS}


def _listen_to_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def main(record: Path, command: list[str]) -> int:
    raise_loopback()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is the command's
    seen: set[str] = set()
    with subprocess.Popen(command, preexec_fn=_listen_to_ctrl_c) as child:
        while child.poll() is None:
            seen |= listening()
            time.sleep(0.02)
    record.write_text(json.dumps({"lost": lost(), "listening": sorted(seen)}))
    return child.returncode


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
