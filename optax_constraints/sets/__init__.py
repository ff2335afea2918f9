"""The sets: one family a file, without Optax and without paths."""
