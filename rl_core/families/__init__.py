"""One module per family of methods: its protocol, its batch and its trainer."""
