"""What one rank computes: the model, its parallel parts, and the Ray actor that hosts a shard."""
