"""What the parts of `UtilityVM` have in common. `disks` and `programs` are two of them; its life is `utility_vm`'s."""

from __future__ import annotations

from utilityvm.scsi.manager import ScsiManager
from utilityvm.tasks import Deadline
from utilityvm.vm.owned import OwnedVM


class Face:
    """Calls of a VM that this process owns."""

    def __init__(self, vm: OwnedVM) -> None:
        self._vm = vm

    @property
    def name(self) -> str:
        """The VM's name, which no other VM of this user has."""
        return self._vm.name

    @property
    def _where(self) -> dict[str, object]:
        """For the errors of its calls."""
        return {"vm": self._vm.name}

    @property
    def _scsi(self) -> ScsiManager:
        """Its calls ask nothing of the VM's state."""
        return self._vm.scsi

    async def _ready(self, deadline: Deadline) -> None:
        await self._vm.ready(deadline)
