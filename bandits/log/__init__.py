"""The decision log: acknowledged means durable, and each key is there once."""
