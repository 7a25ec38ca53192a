"""What the guest image is made of. Data: `build` turns it into files, and its text is part of the cache's key."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from utilityvm.errors import SetupError


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """What differs between machines. Only amd64 has been tried."""

    debian: str  # Debian's name of it
    kernel_package: str
    console: str
    loader: str  # the dynamic loader, which runs the guest's own python on the host to compile ahead


ARCHITECTURES: Final[Mapping[str, Architecture]] = {
    "x86_64": Architecture(
        debian="amd64",
        kernel_package="linux-image-cloud-amd64",
        console="ttyS0",
        loader="lib/x86_64-linux-gnu/ld-linux-x86-64.so.2",
    ),
    "aarch64": Architecture(
        debian="arm64",
        kernel_package="linux-image-cloud-arm64",
        console="ttyAMA0",
        loader="lib/aarch64-linux-gnu/ld-linux-aarch64.so.1",
    ),
}


def architecture() -> Architecture:
    """The architecture of this machine.

    Raises:
        SetupError: there is no recipe for it.
    """
    machine = platform.machine()
    try:
        return ARCHITECTURES[machine]
    except KeyError:
        known = ", ".join(ARCHITECTURES)
        raise SetupError(f"no guest image for {machine}", remedy=f"there are recipes for {known}") from None


# A small userland to run commands in, what the agent needs, and nothing that starts by itself.
PACKAGES: Final = (
    "bash",
    "busybox-static",
    "coreutils",
    "dash",
    "diffutils",
    "e2fsprogs",
    "findutils",
    "grep",
    "gzip",
    "kmod",
    "mawk",
    "mount",
    "procps",
    "python3",
    "sed",
    "tar",
    "util-linux",
    "xfsprogs",
)

# The initramfs loads these, with what they depend on, in this order.
BOOT_MODULES: Final = ("virtio_pci", "virtio_scsi", "sd_mod", "ext4", "overlay", "virtio_console", "virtio-rng")

# Kernel modules that stay on the root disk: paths below `kernel/` that begin so.
MODULE_FOLDERS: Final = (
    "arch/",
    "block/",
    "crypto/",
    "lib/",
    "fs/btrfs/",
    "fs/configfs/",
    "fs/erofs/",
    "fs/ext4/",
    "fs/exfat/",
    "fs/fat/",
    "fs/fuse/",
    "fs/isofs/",
    "fs/jbd2/",
    "fs/mbcache",
    "fs/nls/",
    "fs/overlayfs/",
    "fs/quota/",  # ext4 asks for it when a disk has quotas; nothing names it as a dependency
    "fs/squashfs/",
    "fs/udf/",
    "fs/xfs/",
    "fs/binfmt_misc",
    "drivers/block/loop",
    "drivers/block/virtio_blk",
    "drivers/char/hw_random/virtio",
    "drivers/char/virtio_console",
    "drivers/cdrom/",
    "drivers/dax/",
    "drivers/firmware/qemu_fw_cfg",
    "drivers/md/",
    "drivers/net/tun",
    "drivers/net/virtio_net",
    "drivers/net/net_failover",
    "drivers/scsi/scsi_",
    "drivers/scsi/sd_mod",
    "drivers/scsi/sg",
    "drivers/scsi/sr_mod",
    "drivers/scsi/virtio_scsi",
    "drivers/scsi/device_handler/",
    "drivers/virt/",
    "drivers/virtio/",
    "net/core/failover",
    "net/vmw_vsock/",
)
MODULES_LEFT_OUT: Final = (
    "arch/x86/kvm/",
    "drivers/dax/dax_pmem",
    "drivers/virtio/virtio_vdpa",
    "net/vmw_vsock/hv_",
    "net/vmw_vsock/vmw_vsock_vmci",
)

# What nobody reads in a VM.
LEFT_OUT: Final = (
    "boot/System.map",
    "boot/config-",
    "etc/apt/",
    "etc/cron",
    "etc/init.d/",
    "etc/rc",
    "etc/systemd/",
    "lib/systemd/",
    "lib/udev/",
    "usr/bin/perl",
    "usr/bin/udevadm",
    "usr/lib/aarch64-linux-gnu/gconv/",
    "usr/lib/aarch64-linux-gnu/libicu",
    "usr/lib/aarch64-linux-gnu/libperl",
    "usr/lib/aarch64-linux-gnu/perl",
    "usr/lib/klibc/",
    "usr/lib/systemd/",
    "usr/lib/udev/",
    "usr/lib/x86_64-linux-gnu/gconv/",
    "usr/lib/x86_64-linux-gnu/libicu",  # of xfs_scrub alone
    "usr/lib/x86_64-linux-gnu/libperl",
    "usr/lib/x86_64-linux-gnu/perl",
    "usr/share/bash-completion/",
    "usr/share/doc/",
    "usr/share/info/",
    "usr/share/initramfs-tools/",
    "usr/share/lintian/",
    "usr/share/locale/",
    "usr/share/man/",
    "usr/share/perl",
    "usr/share/zoneinfo/",
    "var/cache/apt/",
    "var/lib/apt/",
    "var/lib/dpkg/",
    "var/log/apt/",
)

# Of Python's standard library.
LIBRARIES_LEFT_OUT: Final = ("ensurepip", "idlelib", "lib2to3", "pydoc_data", "test", "turtledemo")

# No package's own script runs, so what those would have made is written here: text and mode.
FILES: Final[Mapping[str, tuple[str, int]]] = {
    "etc/passwd": (
        "root:x:0:0:root:/root:/bin/bash\n"
        "daemon:x:1:1:daemon:/usr/sbin:/usr/sbin/nologin\n"
        "nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
        0o644,
    ),
    "etc/group": ("root:x:0:\ndaemon:x:1:\ntty:x:5:\ndisk:x:6:\nnogroup:x:65534:\n", 0o644),
    "etc/shadow": ("root:*:19000:0:99999:7:::\n", 0o600),
    "etc/hostname": ("utilityvm\n", 0o644),
    "etc/hosts": ("127.0.0.1 localhost utilityvm\n::1 localhost\n", 0o644),
    "etc/nsswitch.conf": ("passwd: files\ngroup: files\nhosts: files dns\n", 0o644),
    "etc/machine-id": ("", 0o644),
    "etc/fstab": ("", 0o644),
    "etc/resolv.conf": ("", 0o644),
}
LINKS: Final[Mapping[str, str]] = {
    "usr/bin/awk": "mawk",
    "usr/bin/which": "which.debianutils",
    "etc/mtab": "../proc/self/mounts",
    "var/run": "/run",
}
FOLDERS: Final[Mapping[str, int]] = {
    "dev": 0o755,
    "home": 0o755,
    "media": 0o755,
    "mnt": 0o755,
    "opt": 0o755,
    "proc": 0o755,
    "root": 0o700,
    "run": 0o755,
    "srv": 0o755,
    "sys": 0o755,
    "tmp": 0o1777,
    "var/log": 0o755,
    "var/tmp": 0o1777,
}

# Whatever else busybox can do is linked to it, but for the programs that would take the agent's place as init.
APPLETS_LEFT_OUT: Final = ("halt", "init", "linuxrc", "poweroff", "reboot", "runsvdir", "start-stop-daemon")

TIME: Final = 1_735_689_600  # 2025-01-01: the time of every file, so that the same input makes the same image
ROOT_LABEL: Final = "utilityvm"

# `quiet` because each line on an emulated serial port costs time; panic=-1 ends QEMU at once when the kernel dies.
KERNEL_COMMAND_LINE: Final = (
    "quiet panic=-1 reboot=t random.trust_cpu=on net.ifnames=0 mitigations=auto tsc=reliable raid=noautodetect"
    " rcupdate.rcu_expedited=1"  # the kernel lets go of a device in 30 ms and not 50
    " no_timer_check"  # an emulated timer is late on a busy machine, and the kernel would panic at its boot
)

_INIT: Final = r"""#!/bin/busybox sh
# Finds the root disk by its address on the bus, and hands over to the agent.
fail() {
    echo "utilityvm: the guest cannot start: $*" > /dev/console
    /bin/busybox poweroff -f
}
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
for module in @MODULES@; do
    /bin/busybox insmod "/modules/$module" 2> /insmod.log || fail "module $module: $(/bin/busybox cat /insmod.log)"
done
controllers=
for word in $(/bin/busybox cat /proc/cmdline); do
    case "$word" in utilityvm.scsi=*) controllers="${word#*=}" ;; esac
done
first="${controllers%%,*}"
[ -n "$first" ] || fail "no utilityvm.scsi= on the kernel command line"
while :; do
    for found in /sys/bus/pci/devices/$first/virtio*/host*/target*/*:0:0:0/block/sd*; do
        [ -e "$found" ] && /bin/busybox mount -t ext4 -o ro,noload "/dev/${found##*/}" /lower 2> /mount.log && break 2
    done
    read -r up rest < /proc/uptime
    [ "${up%.*}" -lt 30 ] || fail "no root disk at 0:0 of $first: $(/bin/busybox cat /mount.log)"
    /bin/busybox usleep 5000
done
/bin/busybox mount -t tmpfs -o mode=0755 tmpfs /rw || fail "no tmpfs"
/bin/busybox mkdir /rw/upper /rw/work
/bin/busybox mount -t overlay -o lowerdir=/lower,upperdir=/rw/upper,workdir=/rw/work overlay /root || fail "no overlay"
for folder in dev proc sys; do
    /bin/busybox mount --move /$folder /root/$folder || fail "cannot move /$folder"
done
exec /bin/busybox switch_root /root @AGENT@
fail "no agent"
"""


def init_script(modules: Iterable[str], *, agent: str) -> str:
    """The initramfs's `/init`: loads `modules` in their order, and ends as the command `agent`."""
    return _INIT.replace("@MODULES@", " ".join(f"{name}.ko" for name in modules)).replace("@AGENT@", agent)
