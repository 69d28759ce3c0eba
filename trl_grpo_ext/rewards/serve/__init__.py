"""A reward server: one machine scores the completions of many trainers."""
