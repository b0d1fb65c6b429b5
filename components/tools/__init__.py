"""Commands that are no step of a pipeline: they read what steps left, and no step imports them."""
