"""Laws that hold exactly, or to rounding, on every log."""
