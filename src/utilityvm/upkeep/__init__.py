"""Keeping a host in order.

::

    await doctor()                # findings: what VMs need of this machine
    find_leftovers()              # leftovers: what is left of things that are gone; remove_leftover takes one away
    await examine_vm("worker")    # repair: where a VM's journal, QEMU and guest disagree; repair_vm makes them agree
    remove_images([old])          # images: guest images that nothing uses
"""
