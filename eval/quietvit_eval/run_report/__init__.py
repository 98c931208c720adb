"""One page about one run: what it is, how it goes, what is wrong with it."""
