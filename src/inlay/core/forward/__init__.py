"""Which rows of a forward go through which adapter: routes, hosts, and the wrappers around a module's forward."""
