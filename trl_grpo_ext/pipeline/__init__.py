"""Several recipes, one after the other: each a program of its own, skipped when it is complete."""
