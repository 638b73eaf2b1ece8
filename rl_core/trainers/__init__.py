"""Trainers: they own all state of a run, and go on with it to the bit. One per family."""
