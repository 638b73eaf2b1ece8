"""One module per published method: fields, paper, two pure functions."""
