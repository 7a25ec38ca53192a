"""The guest images in the cache of this user. These functions read files and block for some milliseconds."""

from __future__ import annotations

from utilityvm.errors import SetupError
from utilityvm.guestimage import build
from utilityvm.guestimage.build import GuestImage
from utilityvm.guestimage.custom import GuestRecipe
from utilityvm.machine.names import check_text
from utilityvm.machine.oserrors import typed


@typed
def list_images() -> list[GuestImage]:
    """Every whole guest image in the cache, the newest first."""
    return build.catalog()


@typed
def find_image(recipe: GuestRecipe | None = None) -> GuestImage | None:
    """The newest guest image of a recipe, or the one that a VM boots if it is given none. None: it is not built.

    Raises:
        InvalidRequest: a file of the recipe cannot be read.
    """
    return build.find(recipe)


@typed
def get_image(key: str) -> GuestImage:
    """The guest image whose key begins so.

    Raises:
        SetupError: there is none, or there are several; names them.
    """
    check_text("guest image", key)
    images = build.catalog()
    found = [image for image in images if image.key == key] or [image for image in images if image.key.startswith(key)]
    if len(found) == 1:
        return found[0]
    known = ", ".join(image.key for image in (found or images))
    said = "several guest images have keys that begin" if found else "no guest image has a key that begins"
    raise SetupError(
        f"{said} with {key!r}",
        remedy=f"the images: {known}" if known else "build one: uvm image build",
    )
