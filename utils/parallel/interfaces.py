"""Choice of the network interface between the hosts of a run."""

import array
import contextlib
import ipaddress
import os
import socket
import struct
import sys
from pathlib import Path

from ..common.messages import logger


def choose_interface(ranks, store):
    """Set GLOO_SOCKET_IFNAME to the interface that routes to MASTER_ADDR, in a run of several hosts.

    By default gloo uses the address of the host's own name, which is a loopback address on Debian and Ubuntu. If the
    user has set the variable, it is not changed.

    Args:
        ranks: `Ranks` of this process.
        store: of the run, in which each process has put its address under "met/RANK".
    """
    if ranks.local_size == ranks.size or os.environ.get("GLOO_SOCKET_IFNAME"):
        return
    addresses = [store.get(f"met/{rank}").decode() for rank in range(ranks.size)]
    address = addresses[ranks.rank]
    remote = [other for other in addresses if other and not _is_loopback(other)]
    if remote and _is_loopback(address):        # MASTER_ADDR is the name of this host
        address = local_address(remote[0], os.environ["MASTER_PORT"])
    interface = None
    with contextlib.suppress(OSError):      # the system does not list its interfaces
        interface = _interface(address)
    if interface is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = interface
    if ranks.local_rank == 0:
        logger.info("GLOO_SOCKET_IFNAME: not set; " + (
            f"gloo uses {interface}, which leads to the other hosts from {address}" if interface is not None else
            "the interface that leads to the other hosts is unknown, so gloo uses the address of this host's own name, "
            "at which the others may not reach it"))


def local_address(host, port):
    """Return the address from which this machine would send to a host; "" without a route. Sends nothing."""
    with contextlib.suppress(OSError):      # the name has no address
        for family, kind, protocol, _, target in socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM):
            with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as probe:
                probe.connect(target)
                return probe.getsockname()[0]
    return ""


def _is_loopback(address):
    return address != "" and ipaddress.ip_address(address).is_loopback


def _interface(address):
    """Return the name of the network interface with an address; None if it is unknown, as on systems but Linux."""
    if sys.platform != "linux" or address == "":
        return None
    import fcntl

    address = ipaddress.ip_address(address)
    if address.version == 6:
        rows = [row.split() for row in Path("/proc/net/if_inet6").read_text().splitlines()]
        return next((name for number, *_, name in rows if number == address.packed.hex()), None)
    # SIOCGIFCONF of netdevice(7) writes a `struct ifreq` of 40 bytes for each IPv4 address: a name of 16 bytes, then a
    # `struct sockaddr_in` with family, port and address.
    entries = array.array("B", bytes(1024 * 40))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("iP", len(entries), entries.buffer_info()[0])
        filled, _ = struct.unpack("iP", fcntl.ioctl(any_socket, 0x8912, request))
    for start in range(0, filled, 40):
        name, _, packed = struct.unpack_from("16s4s4s", entries, start)
        if packed == address.packed:
            return name.rstrip(b"\0").decode()
    return None
