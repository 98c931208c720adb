"""Registers for models that have none: test-time registers, and how they and further training compare."""
