"""Transfer of adapters to a new base model (arrives with its own issue)."""
