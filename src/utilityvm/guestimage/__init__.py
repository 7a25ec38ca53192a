"""The guest image that VMs boot: built from packages of this system and our agent, and kept in the cache."""
