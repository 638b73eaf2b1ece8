"""Claims about simulated logs whose truth is known."""
