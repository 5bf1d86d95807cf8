"""The wire messages, and the code generated from them by `python -m protocol.generate`."""
