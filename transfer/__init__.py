"""Transfer of adapters to a new base model, in stages that a killed job goes on from."""
