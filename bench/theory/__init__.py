"""The SAM/AT paper's binary model."""
