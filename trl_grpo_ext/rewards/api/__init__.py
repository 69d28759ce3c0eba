"""Rewards from services over HTTP."""
