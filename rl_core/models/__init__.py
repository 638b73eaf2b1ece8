"""Language models: one small enough to train from nothing in a minute, and any of Hugging Face's."""
