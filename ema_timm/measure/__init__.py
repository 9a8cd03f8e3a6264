"""A checkpoint and images -> counted metrics."""
