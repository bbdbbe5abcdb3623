"""Adapters to the programs that host the library, one package each."""
