"""The nodes: thin, one module per group of them."""
