"""Names of a disk: a path of its image, its guest path, and in a clone the path that it has in the template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Protocol, TypeVar

from utilityvm.errors import InvalidRequest, NotAttached
from utilityvm.machine import paths
from utilityvm.machine.hostpath import HostPath, absolute
from utilityvm.scsi.slot import Slot
from utilityvm.templates.overlay import overlay_path

if TYPE_CHECKING:
    from utilityvm.templates.catalog import Template


class Row(Protocol):
    """A disk of a VM, as the store or the manager tells it."""

    @property
    def slot(self) -> Slot: ...
    @property
    def host_path(self) -> str: ...
    @property
    def identity(self) -> str: ...
    @property
    def guest_paths(self) -> tuple[PurePosixPath, ...]: ...


R = TypeVar("R", bound=Row)


def template_paths(template: Template, vm_uuid: str) -> dict[str, str]:
    """The overlay that the clone of this UUID has for each path that a writable disk has in its template.

    If the template was saved of a clone, the path of the image under all overlays is such a path as well.
    """
    folder = paths.overlays_dir(vm_uuid)
    return {
        path: str(overlay_path(folder, disk.slot))
        for disk in template.manifest.disks
        if not disk.read_only
        for path in (disk.layers[-1].path, disk.host_path)
    }


def find(
    rows: Sequence[R], name: HostPath, identity: str | None, *, aliases: Mapping[str, str], vm: str
) -> tuple[R, PurePosixPath | None]:
    """The disk that is meant by any of its names; and its guest path, if that was the name.

    `identity` is that of the file to which the name leads. A path that leads nowhere any more is the one by which the
    disk was attached. `aliases`: see `template_paths`.

    Raises:
        NotAttached: there is none.
        InvalidRequest: it is the path of one, and the guest path of another.
    """
    path, guest_path = absolute(name), PurePosixPath(name)
    row = next((row for row in rows if row.identity == identity), None)
    row = row or next((row for row in rows if row.host_path == path), None)
    row = row or next((row for row in rows if row.host_path == aliases.get(path)), None)
    inside = next((row for row in rows if guest_path in row.guest_paths), None)
    if row is not None and inside is not None and row is not inside:
        raise InvalidRequest(
            f"{name} is the disk at {row.slot}, and the guest path of the disk at {inside.slot}",
            vm=vm,
            remedy=f"name the image of the one that you mean: {row.host_path} or {inside.host_path}",
        )
    if row is not None:
        return row, None
    if inside is not None:
        return inside, guest_path
    raise NotAttached(f"{name} is not attached to VM {vm}", vm=vm, host_path=path, remedy=f"see what is: uvm ls {vm}")
