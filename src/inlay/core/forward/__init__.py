"""Which rows of a forward go through what: the route, the hosts that ask it, and what stands around a module."""
