"""Logs that are larger than one memory: built tables of whole episodes, with one index."""
