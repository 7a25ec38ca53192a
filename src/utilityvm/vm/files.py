"""Files between this host and the guest, as `UtilityVM` has them."""

from __future__ import annotations

from collections.abc import AsyncIterable
from pathlib import PurePosixPath

from utilityvm.guests.copying import MAX_GET_BYTES, MAX_READ_BYTES, Copies, CopyResult, EscapingLinks
from utilityvm.guests.program import OutputSink
from utilityvm.machine.hostpath import HostPath
from utilityvm.machine.oserrors import raises_callers_errors, typed_errors
from utilityvm.vm.arguments import timed
from utilityvm.vm.face import Face


@typed_errors
class VMFiles(Face):
    """The part of `UtilityVM` that copies files."""

    @timed
    @raises_callers_errors
    async def put(
        self,
        src: HostPath | AsyncIterable[bytes],
        guest_path: str | PurePosixPath,
        *,
        timeout_s: float | None = None,
    ) -> CopyResult:
        """Copy a file, a link or a folder of this host into the guest; or bytes as they come, as a file.

        If `guest_path` is a folder, the copy gets the name of `src` in it; else `guest_path` is its name, and the
        folder above must be there. `src` that ends with `/.` means what is in that folder. Modes, times and symbolic
        links are kept, owners as numbers if the agent runs as root; files with holes keep them. Hard links become
        files of their own, and extended attributes are not copied. Sockets, FIFOs and devices are left out: see
        `CopyResult.skipped`.

        No file has its final name before it is complete, also if the guest dies; nor has a folder that was not there
        before. If this fails, files that were complete may be there, if they were copied into an existing folder.

        Raises:
            InvalidRequest: `src` is not there, or is no file, link or folder; or `guest_path` is not absolute.
            AccessDenied: `src` may not be read.
            GuestRefused: the guest could not write it; `kind` is "not_found" if the folder above is not there.
            DeadlineExceeded: it was not done within `timeout_s` seconds.
            NotSupported: the guest image is too old: build it anew.
            VMGone: the VM died.
        """
        self._vm.check()
        async with self._vm.ends_told():
            return await self._copies.put(src, guest_path, timeout_s=timeout_s)

    @timed
    @raises_callers_errors
    async def get(
        self,
        guest_path: str | PurePosixPath,
        dst: HostPath | OutputSink,
        *,
        links: EscapingLinks = "refuse",
        max_bytes: int = MAX_GET_BYTES,
        timeout_s: float | None = None,
    ) -> CopyResult:
        """Copy a file, a link or a folder of the guest to this host; or give the bytes of a file to `dst`, a function.

        Names and kept is as with `put`, but for set-user-id, set-group-id and sticky bits, which are dropped. Nothing
        outside of the destination is touched, whatever the guest sends. `links` says what becomes of symbolic links
        that lead out of what is copied: all absolute ones do.

        Raises:
            UnsafePath: the guest sent a link that leads out, or a name that does.
            GuestRefused: the guest could not read it, it has more than `max_bytes` ("limit"), or is not there
                ("not_found").
            InvalidRequest: what is at `dst` is in the way, or the folder above is not there.
            AccessDenied, SetupError: this host could not write it.
            ProtocolError: what the guest sent makes no sense.
            others: as `put`.
        """
        self._vm.check()
        async with self._vm.ends_told():
            return await self._copies.get(guest_path, dst, links=links, max_bytes=max_bytes, timeout_s=timeout_s)

    @timed
    async def read_bytes(
        self, guest_path: str | PurePosixPath, *, max_bytes: int = MAX_READ_BYTES, timeout_s: float | None = None
    ) -> bytes:
        """The bytes of a file in the guest. Links are followed.

        Raises:
            GuestRefused: it cannot be read, has more than `max_bytes` ("limit"), or is not there ("not_found").
            others: as `put`.
        """
        self._vm.check()
        async with self._vm.ends_told():
            return await self._copies.read_bytes(guest_path, max_bytes=max_bytes, timeout_s=timeout_s)

    @timed
    async def write_bytes(
        self,
        guest_path: str | PurePosixPath,
        data: bytes | bytearray | memoryview,
        *,
        mode: int | None = None,
        timeout_s: float | None = None,
    ) -> None:
        """Make `data` the content of a file in the guest: whole, or the file is as it was.

        A file that is replaced leaves its mode and owner; a new one is root's, with `mode`, or 0644. A link is
        replaced, and not followed.

        Raises:
            GuestRefused: it cannot be written, or the folder above is not there ("not_found").
            others: as `put`.
        """
        self._vm.check()
        async with self._vm.ends_told():
            await self._copies.write_bytes(guest_path, bytes(data), mode=mode, timeout_s=timeout_s)

    @property
    def _copies(self) -> Copies:
        return Copies(self._vm.guest.run_streaming, vm=self.name)
