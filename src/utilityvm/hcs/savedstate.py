"""`utilityvm.hosts.hcs.savedstate`, under its short name."""

from utilityvm.hosts.hcs.savedstate import *  # noqa: F403
from utilityvm.hosts.hcs.savedstate import __all__ as __all__
