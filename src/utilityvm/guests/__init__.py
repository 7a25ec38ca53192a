"""Guest backends: what talks to the system inside the VM. `bridge_guest` speaks to our agent, and to hcsshim's gcs."""
