"""The reward for programs: run in a sandbox, judged outside of it."""
