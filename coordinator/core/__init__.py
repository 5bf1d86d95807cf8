"""What a coordinator decides: pure, no clock, no IO, no luck of its own."""
