"""Reading and writing weights: quietvit's own file, DINOv2's and T2T-ViT's."""

from quietvit.weights.dinov2 import load_dinov2
from quietvit.weights.extractor import BackboneExtractor, load, random_like
from quietvit.weights.native import load_backbone, save_teacher
from quietvit.weights.t2t import load_t2t

__all__ = ["BackboneExtractor", "load", "load_backbone", "load_dinov2", "load_t2t", "random_like", "save_teacher"]
