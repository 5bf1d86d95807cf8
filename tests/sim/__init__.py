"""A whole swarm of the real machines on a virtual clock, with seeded faults."""
