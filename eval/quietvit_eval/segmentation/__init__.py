"""Semantic segmentation from frozen features."""
