"""A run on the Hub: uploads that no outage can hold up, the model card, the completions."""
