"""Where an erasure happened."""
