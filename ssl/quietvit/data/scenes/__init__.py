"""The embedded data set: rendered scenes with labels, segmentation and metric depth, and nothing to download."""

from quietvit.data.scenes.dataset import SceneImage, Scenes

__all__ = ["SceneImage", "Scenes"]
