"""`utilityvm.hosts.hcs.documents`, under its short name."""

from utilityvm.hosts.hcs.documents import *  # noqa: F403
from utilityvm.hosts.hcs.documents import __all__ as __all__
