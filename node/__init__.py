"""The contributor's daemon."""
