"""Writing a model for others. `export_teacher` writes quietvit's own folder."""

from quietvit.weights.export.safetensors_folder import export_teacher, greatest_difference

__all__ = ["export_teacher", "greatest_difference"]
