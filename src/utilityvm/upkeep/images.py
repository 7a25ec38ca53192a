"""Removing guest images, which VMs and templates may use."""

from __future__ import annotations

import shutil
from collections.abc import Iterable

from utilityvm.errors import DiskInUse
from utilityvm.guestimage import build
from utilityvm.guestimage.build import GuestImage
from utilityvm.machine.oserrors import typed
from utilityvm.store.recover import open_store
from utilityvm.upkeep.leftovers import users_of_image


@typed
def remove_images(images: Iterable[GuestImage]) -> None:
    """Remove guest images from the cache: all of them, or none. It blocks. Calling it again is no error.

    Raises:
        DiskInUse: a VM or a template uses one; names them.
        SetupError: a guest image is just being built.
    """
    images = list(images)
    with open_store() as store, build.alone():
        for image in images:
            if users := users_of_image(store, image.folder):
                raise DiskInUse(
                    f"the guest image {image.key} is used by {', '.join(users)}",
                    host_path=image.root,
                    remedy="stop or remove them first",
                )
        for image in images:
            shutil.rmtree(image.folder, ignore_errors=not image.folder.exists())
