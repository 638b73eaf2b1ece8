"""Doors in: logs as other systems wrote them, each read into the same events and checked by the same rules."""
