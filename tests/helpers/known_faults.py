"""Faults that utilityvm once had, or would have with one line less: how to put each back, and what has to find it."""

# ruff: noqa: E501  source as it stands there

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

EXPLORER: Final = "the explorer"
MODEL: Final = "tests/scsi/test_against_model.py"
BEHAVIOURS: Final = "tests/scsi/test_behaviours.py"
MOUNTS: Final = "tests/vm/test_mount.py"


@dataclass(frozen=True)
class Fault:
    """`edits`: each a file below `src/utilityvm`, what stands there once, and what stands there with the fault."""

    name: str
    edits: list[tuple[str, str, str]]
    found_by: str = EXPLORER


FAULTS: Final = [
    Fault(
        "force is a flag on the disk",
        [
            ("scsi/disk.py", "    halted: bool = False", "    forced: Force = Force.NO\n    halted: bool = False"),
            (
                "scsi/disk.py",
                "return Force.HOST if self.overruled is not None else force_of(self.leaving.values())",
                "return self.forced",
            ),
            (
                "scsi/mount.py",
                "        if self.disk.overruled is not None:\n            return Force.HOST\n",
                "        return self.disk.forced\n",
            ),
            (
                "scsi/book.py",
                "        claim.force = force\n",
                "        claim.force = force\n        disk.forced = max(disk.forced, force)\n",
            ),
        ],
    ),
    Fault(
        "one release's force is enough for all",
        [("scsi/reservation.py", "return min((claim.force", "return max((claim.force")],
    ),
    Fault("force does not reach the eject", [("scsi/steps.py", "force=self._tells(disk, disk.force)", "force=False")]),
    Fault(
        "the host takes a disk that somebody has",
        [("scsi/disk.py", "not self.is_wanted and self.force is Force.HOST", "self.force is Force.HOST")],
    ),
    Fault(
        "a resize beside the worker",
        [
            ("scsi/manager.py", "if size_bytes < disk.wanted_bytes:", "if size_bytes < disk.size_bytes:"),
            (
                "scsi/manager.py",
                "        disk.resizes.append(resize)\n        self._workers.kick(disk)\n",
                "        disk.size_bytes = await self._host.resize(\n            disk.slot, attachment=disk.id, size_bytes=size_bytes, timeout_s=9\n        )\n        resize.waiter.set_result(None)\n",
            ),
        ],
    ),
    Fault(
        "a size is compared before its turn alone",
        [
            ("scsi/manager.py", "if size_bytes < disk.wanted_bytes:", "if size_bytes < disk.size_bytes:"),
            ("scsi/worker.py", "if wanted < disk.size_bytes:", "if False:"),
            ("scsi/worker.py", "if wanted > disk.size_bytes:", "if wanted != disk.size_bytes:"),
        ],
    ),
    Fault(
        "a refused release gives away, but if it was busy",
        [
            (
                "scsi/worker.py",
                "[claim for claim in blocked if claim.is_awaited and _is_whole(claim)]",
                "[claim for claim in blocked if type(error).__name__ == 'GuestBusy' and claim.is_awaited and _is_whole(claim)]",
            )
        ],
    ),
    Fault(
        "force is refused after the claim changed",
        [
            (
                "scsi/manager.py",
                "        if Force.of(force) is Force.GUEST:\n            self._guest.check_force(claim.disk.slot)\n        self._book.give_back(claim, force=Force.of(force))\n",
                "        self._book.give_back(claim, force=Force.of(force))\n        if Force.of(force) is Force.GUEST:\n            self._guest.check_force(claim.disk.slot)\n",
            )
        ],
    ),
    Fault(
        "two removals take the same reference",
        [("scsi/manager.py", "            and not claim.is_awaited\n        ]", "        ]")],
    ),
    Fault(
        "what is released inside the block is released again",
        [
            (
                "vm/mount.py",
                "        except (AlreadyReleased, NotAttached):\n            return  # by another call: of the VM, or of another owner\n",
                "",
            )
        ],
        MOUNTS,
    ),
    Fault(
        "events do not end with the VM",
        [
            (
                "scsi/manager.py",
                "        self._gone = error\n        self._events.end()\n",
                "        self._gone = error\n",
            )
        ],
    ),
    Fault(
        "events begin with the first that is asked for",
        [
            (
                "scsi/events.py",
                "            self._listeners.add(listener)\n",
                "            listener._begin = lambda: self._listeners.add(listener)\n",
            ),
            (
                "scsi/events.py",
                "        while not self._unread:\n",
                "        self._begin()\n        while not self._unread:\n",
            ),
        ],
    ),
    Fault(
        "a cancelled batch keeps what had settled",
        [
            (
                "scsi/manager.py",
                "                one.add_done_callback(self._give_up_result)  # also what was there before, or came all the same\n",
                "",
            )
        ],
    ),
    Fault(
        "the failed release of a failed block is not told",
        [("vm/mount.py", "            error.add_note(", "            str(")],
        MOUNTS,
    ),
    Fault(
        "another event loop is let in", [("scsi/manager.py", "elif loop is not self._loop:", "elif False:")], BEHAVIOURS
    ),
    Fault(
        "a busy store stops the event loop",
        [
            (
                "store/journal.py",
                "                await asyncio.sleep(next(waits, database.WAITS_S[-1]))",
                "                time.sleep(next(waits, database.WAITS_S[-1]))",
            )
        ],
        "tests/store/test_journal.py",
    ),
    Fault(
        "a mistake of ours leaves a claim",
        [
            (
                "scsi/worker.py",
                "                    self._note_failure(disk, StepFailed(ours), run)\n",
                "                    run.last = ours\n                    return\n",
            ),
            (
                "scsi/manager.py",
                "            except BaseException:\n                self._give_up(claim)",
                "            except asyncio.CancelledError:\n                self._give_up(claim)",
            ),
        ],
    ),
    Fault(
        "a worker that ends leaves its callers waiting",
        [("scsi/worker.py", "            self._leave_nobody_waiting(disk, run)\n", "")],
    ),
    Fault(
        "work begins while all is held still",
        [("scsi/worker.py", "        if self._is_still:\n", "        if False:\n")],
    ),
    Fault(
        "a step is sent that nobody wants any more",
        [
            (
                "scsi/steps.py",
                "        if not still():\n            self._ledger.note([disk.record()])",
                "        if False:\n            self._ledger.note([disk.record()])",
            ),
        ],
    ),
    Fault(
        "a mount is made that nobody wants any more",
        [
            (
                "scsi/steps.py",
                "        if not still():\n            self._ledger.note([mount.record()])",
                "        if False:\n            self._ledger.note([mount.record()])",
            ),
        ],
    ),
    Fault(
        "a step without an answer counts as refused",
        [
            (
                "scsi/steps.py",
                "            elif isinstance(error, _REFUSALS):\n                self.enter_disk(",
                "            elif True:\n                self.enter_disk(",
            )
        ],
    ),
    Fault(
        "a new file system for whoever comes next",
        [
            (
                "scsi/mount.py",
                "return replace(self.config, reformat=True) if is_asked else self.config",
                "return self.config",
            ),
            ("scsi/book.py", "path, without_reformat(config), now)", "path, config, now)"),
        ],
    ),
    Fault(
        "a cancelled add is not undone",
        [
            (
                "scsi/manager.py",
                "                self._give_up(claim)  # its caller does not get it, whatever the reason, and so leaves it to nobody\n",
                "                pass\n",
            )
        ],
    ),
    Fault(
        "a caller is told before the journal has it",
        [
            (
                "scsi/worker.py",
                "        if run.told:\n            await self._ledger.flush()\n",
                "        if run.told:\n",
            )
        ],
    ),
    Fault(
        "an export does not wait for what is under way",
        [
            (
                "scsi/manager.py",
                "                await self.settle()\n            if self._gone",
                "                pass\n            if self._gone",
            )
        ],
    ),
    Fault(
        "changes after an export", [("scsi/manager.py", "if self._exported or self._imported:", "if self._imported:")]
    ),
    Fault(
        "changes before an import is resumed",
        [("scsi/manager.py", "if self._exported or self._imported:", "if self._exported:")],
    ),
    Fault(
        "an import believes the document",
        [
            (
                "scsi/migration.py",
                "    there = await host.probe(slot, attachment=disk.attachment, timeout_s=timeout_s)\n",
                "    there = True\n",
            )
        ],
    ),
    Fault(
        "an import believes the document's mounts",
        [
            (
                "scsi/migration.py",
                "if not (there and await guest.probe_mount(slot, guest_path=path, timeout_s=timeout_s)):",
                "if not there:",
            )
        ],
    ),
    Fault(
        "an import that failed counts as done",
        [
            (
                "scsi/manager.py",
                "        state, holder = self._imported\n",
                "        state, holder = self._imported\n        self._imported = None\n",
            )
        ],
    ),
    Fault(
        "reservations get new names in an import",
        [
            (
                "scsi/migration.py",
                "        elif isinstance(record, MountRecord):\n            path",
                "        elif not isinstance(record, (DiskRecord, MountRecord)):\n            record = replace(record, reservation=new_id())\n        elif isinstance(record, MountRecord):\n            path",
            )
        ],
    ),
]
