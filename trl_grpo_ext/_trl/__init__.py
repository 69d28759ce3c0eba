"""The only place that knows a private name of TRL."""
