"""Templates: a VM that was booted and warmed, frozen with its disks, and what clones of it are made from.

A template is a folder (catalog.py) with the VM's memory, its devices' state and a manifest (manifest.py), which names
the disks. Nothing in it changes after it was saved. A clone maps the memory privately, has an overlay of its own over
each disk that is written to (overlay.py), shares the others, and is made itself before it is handed out.
"""
