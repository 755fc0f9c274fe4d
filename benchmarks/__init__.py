"""Measured speed, always as a ratio to native torch in the same run."""
