"""This host: where our files are, which process a pid means, the programs that we start, what a path leads to."""
