"""Reading and writing weights: quietvit's own file, and those of DINOv2, T2T-ViT, open_clip, timm and transformers."""

from quietvit.weights.extractor import BackboneExtractor, load, random_like
from quietvit.weights.native import load_backbone, save_teacher
from quietvit.weights.released import load_released

__all__ = ["BackboneExtractor", "load", "load_backbone", "load_released", "random_like", "save_teacher"]
