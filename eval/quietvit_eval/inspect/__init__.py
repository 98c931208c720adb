"""The laboratory: what is inside a frozen model. Norms, artifacts and what their tokens know; attention; maps."""
