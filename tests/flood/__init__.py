"""Floods against the coordinator's faces: `make flood`."""
