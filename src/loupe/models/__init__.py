"""Networks and their weights: timm classifiers and anomaly detectors, each kept as safetensors and JSON."""
