"""The record: MLflow runs, logged models, the registry. The only room that imports mlflow."""
