"""Images on disk: sources, manifest, expectations, split, preparation, augmentation and loading."""
