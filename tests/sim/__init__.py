"""The next simulator: rollbacks, freezes, one-way partitions, clock jumps, old disks. Not part of `make test` yet: some seeds do not settle."""
