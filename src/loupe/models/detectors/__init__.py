"""Anomaly detectors: fitted on normal images alone; a higher score is more anomalous."""
