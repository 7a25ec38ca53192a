"""What talks to hypervisors: one package for each."""
