"""What the methods cost and how right they are, measured: python -m benchmarks."""
