"""The step, its sharding, the loop, checkpoints and metric writers."""
