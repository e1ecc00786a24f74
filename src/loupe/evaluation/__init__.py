"""Figures and pictures of how good a model is; everything here is computed from values, not from paths."""
