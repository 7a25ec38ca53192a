"""One VM from its start to its end: `utility_vm` is its face, the other modules are what it does."""
