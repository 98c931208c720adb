"""The register study: the same recipe with several numbers of registers, on one page."""
