"""A simulated swarm: the real machines of nodes and coordinator, under seeded faults, checked after every step."""
