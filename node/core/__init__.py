"""What a node decides: pure, no clock, no IO, no luck of its own."""
