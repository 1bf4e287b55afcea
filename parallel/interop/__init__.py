"""Other projects' layers: those of Megatron-Core."""
