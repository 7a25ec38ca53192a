"""hcsshim's documents, gob, clone documents and saved state, under a short name. The code is in `utilityvm.hosts.hcs`.

>>> from utilityvm import hcs
>>> mount = hcs.gob.SCSIMount(host_path="C:\\\\a.vhdx", controller=0, lun=1)
>>> hcs.gob.decode(hcs.gob.encode(mount)) == mount
True
"""

from utilityvm.hcs import clone, documents, gob, savedstate

__all__ = ["clone", "documents", "gob", "savedstate"]
