"""Environments: many side by side, which say apart whether an episode ended or was cut."""
