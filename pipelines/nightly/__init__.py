"""The night: events on disk to tomorrow's shortlist, one step after the other, each a function of a date and the settings."""
