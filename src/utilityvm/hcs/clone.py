"""`utilityvm.hosts.hcs.clone`, under its short name."""

from utilityvm.hosts.hcs.clone import *  # noqa: F403
from utilityvm.hosts.hcs.clone import __all__ as __all__
