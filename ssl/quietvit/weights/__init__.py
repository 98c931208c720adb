"""Reading and writing weights: quietvit's own file and DINOv2's."""

from quietvit.weights.extractor import BackboneExtractor, load, random_like
from quietvit.weights.native import load_backbone, save_teacher

__all__ = ["BackboneExtractor", "load", "load_backbone", "random_like", "save_teacher"]
