"""`utilityvm.hosts.hcs.gob`, under its short name."""

from utilityvm.hosts.hcs.gob import *  # noqa: F403
from utilityvm.hosts.hcs.gob import __all__ as __all__
