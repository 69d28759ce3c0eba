"""Supervised fine-tuning on reasoning traces: what is imitated, and how it is written out."""
