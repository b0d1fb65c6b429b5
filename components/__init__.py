"""The steps: one folder is one room, with its own parameters and code."""
