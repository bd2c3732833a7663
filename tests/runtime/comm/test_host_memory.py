"""Memory that processes of this machine map by a handle: the same bytes, read only, and nobody else's by mistake."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import textwrap

import pytest

from switchgear_runtime.comm.host_memory import HostPeerMemory

NUM_BYTES = 3 << 16


def filled(memory: HostPeerMemory, byte: int) -> int:
    address = memory.allocate(NUM_BYTES)
    assert ctypes.string_at(address, NUM_BYTES) == bytes(NUM_BYTES)
    ctypes.memset(address, byte, NUM_BYTES)
    return address


def in_a_child(code: str, *arguments: str) -> subprocess.Popen[str]:
    """Another process, with a memory of its own."""
    head = "import ctypes, sys\nfrom switchgear_runtime.comm.host_memory import HostPeerMemory\nmemory = HostPeerMemory()\n"
    return subprocess.Popen(
        [sys.executable, "-c", head + textwrap.dedent(code), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_ranks_of_one_process_map_each_other() -> None:
    owner, reader = HostPeerMemory(), HostPeerMemory()
    mine = filled(owner, 7)
    theirs = reader.map(owner.handle(mine))
    assert theirs != mine
    ctypes.memset(mine + 5, 9, 1)
    assert ctypes.string_at(theirs, 8) == bytes([7, 7, 7, 7, 7, 9, 7, 7])
    to = ctypes.create_string_buffer(8)
    reader.copy(ctypes.addressof(to), theirs, 8)
    assert reader.mark()()
    assert to.raw == bytes([7, 7, 7, 7, 7, 9, 7, 7])
    owner.free(mine)
    assert ctypes.string_at(theirs + NUM_BYTES - 1, 1) == b"\7"  # what is mapped stays
    reader.unmap(theirs)


def test_another_process_reads_and_cannot_write() -> None:
    memory = HostPeerMemory()
    address = filled(memory, 0x5A)
    code = """
        address = memory.map(bytes.fromhex(sys.argv[1]))
        print(ctypes.string_at(address, 4).hex(), flush=True)
        ctypes.memset(address, 0, 1)
    """
    child = in_a_child(code, memory.handle(address).hex())
    out, _ = child.communicate(timeout=60)
    assert out.strip() == "5a5a5a5a"
    assert child.returncode == -11  # SIGSEGV
    assert ctypes.string_at(address, 1) == b"\x5a"
    memory.free(address)


def test_memory_of_a_process_that_died_stays_readable_where_it_is_mapped_and_nowhere_else() -> None:
    code = """
        address = memory.allocate(4096)
        ctypes.memset(address, 3, 4096)
        print(memory.handle(address).hex(), flush=True)
        sys.stdin.read()
    """
    child = in_a_child(code)
    assert child.stdout is not None
    handle = bytes.fromhex(child.stdout.readline().strip())
    memory = HostPeerMemory()
    address = memory.map(handle)
    child.kill()
    child.communicate(timeout=60)
    assert ctypes.string_at(address, 4096) == bytes([3]) * 4096
    with pytest.raises(OSError, match=r"No such file|No such process"):
        memory.map(handle)
    memory.unmap(address)


def test_what_is_no_handle_or_no_longer_that_file_is_refused() -> None:
    memory = HostPeerMemory()
    address = filled(memory, 1)
    handle = memory.handle(address)
    for wrong in (b"", handle[:-1], bytes(len(handle))):
        with pytest.raises(OSError, match="no handle"):
            memory.map(wrong)
    memory.free(address)
    descriptors = [filled(memory, 2)]
    with pytest.raises(OSError, match=r"another file by now|No such file"):
        memory.map(handle)
    for one in descriptors:
        memory.free(one)
