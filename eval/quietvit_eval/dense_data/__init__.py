"""Images with a target for every pixel: classes (segmentation) or metres (depth), in the layouts people have."""
