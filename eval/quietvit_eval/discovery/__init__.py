"""Object discovery without labels: one box an image out of frozen features (LOST), scored by CorLoc."""
