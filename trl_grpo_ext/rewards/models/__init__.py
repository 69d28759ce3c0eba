"""Rewards from models in the process: outcome models and process models."""
