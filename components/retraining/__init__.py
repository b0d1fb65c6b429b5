"""Training again: what has changed since the champion, whether that is worth a training, and from where."""
