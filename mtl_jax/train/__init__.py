"""The joint update, its sharding, the loop, checkpoints and metric writers."""
