"""The network interface through which processes of several hosts reach each other."""

import array
import contextlib
import ipaddress
import os
import socket
import struct
import sys
from pathlib import Path

from ..common.messages import logger


def choose_interface(place, store):
    """Let gloo use the interface that routes to MASTER_ADDR where the processes span hosts, unless the user chose one.

    By itself gloo takes the address of the host's own name, which on Debian and Ubuntu is a loopback one.
    store: where all have met, each leaving its address.
    """
    if place.local_size == place.size or os.environ.get("GLOO_SOCKET_IFNAME"):
        return
    addresses = [store.get(f"met/{rank}").decode() for rank in range(place.size)]
    address = addresses[place.rank]
    remote = [other for other in addresses if other and not _is_loopback(other)]
    if remote and _is_loopback(address):        # MASTER_ADDR is the name of this very host
        address = local_address(remote[0], os.environ["MASTER_PORT"])
    interface = None
    with contextlib.suppress(OSError):      # of a system that does not tell
        interface = _interface(address)
    if interface is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = interface
    if place.local_rank == 0:
        logger.info("GLOO_SOCKET_IFNAME: not set; " + (
            f"gloo uses {interface}, which leads to the other hosts from {address}" if interface is not None else
            "which interface leads to the other hosts could not be found out, so gloo uses the address of this host's "
            "own name, by which the others may not reach it"))


def local_address(host, port):
    """The address from which this machine would send to another, as text; "" without a route. Sends nothing."""
    with contextlib.suppress(OSError):      # also for a name that has no address
        for family, kind, protocol, _, target in socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM):
            with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as probe:
                probe.connect(target)
                return probe.getsockname()[0]
    return ""


def _is_loopback(address):
    return address != "" and ipaddress.ip_address(address).is_loopback


def _interface(address):
    """The name of the network interface that has an address; None if none has, or outside of Linux."""
    if sys.platform != "linux" or address == "":
        return None
    import fcntl

    address = ipaddress.ip_address(address)
    if address.version == 6:
        rows = [row.split() for row in Path("/proc/net/if_inet6").read_text().splitlines()]
        return next((name for number, *_, name in rows if number == address.packed.hex()), None)
    # SIOCGIFCONF of netdevice(7) fills in a `struct ifreq` of 40 bytes for each IPv4 address: a name of 16 bytes, and
    # in a `struct sockaddr_in` the address after family and port.
    entries = array.array("B", bytes(1024 * 40))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("iP", len(entries), entries.buffer_info()[0])
        filled, _ = struct.unpack("iP", fcntl.ioctl(any_socket, 0x8912, request))
    for start in range(0, filled, 40):
        name, _, packed = struct.unpack_from("16s4s4s", entries, start)
        if packed == address.packed:
            return name.rstrip(b"\0").decode()
    return None
