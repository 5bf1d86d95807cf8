"""What a node and a coordinator must agree on. Imports nothing else of ours."""
