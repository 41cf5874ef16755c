"""From a validated call to a backend: its choice, the torch operators, their derivatives, and the cache of calls."""
