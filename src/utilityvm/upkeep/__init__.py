"""Keeping a host in order: repair a VM whose records disagree, and remove what is left of things that are gone."""
