"""Loupe: from a folder of images to a promoted, watched and reproducible classifier and anomaly detector."""
