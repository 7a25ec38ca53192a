"""Disk images and block devices of the host: what is in them, and whether a VM may have them.

::

    fd = os.open(host_path, os.O_RDONLY | os.O_CLOEXEC)
    header = headers.read(fd, name=host_path, expected=None)  # or the format of the first registration
    headers.check_safe(header, read_only=True)                # ImageUnsafe, ImageDamaged, NotSupported
    options = headers.driver_options(header)                  # for QEMU's blockdev-add

    fd = os.open("/dev/sdb", blockdev.open_flags(read_only=False))
    blockdev.check_unused(fd, host_path="/dev/sdb")           # DiskInUse names what the host does with it

All of it may be called again; nothing here writes. The calls block: use a thread.
"""
