"""What MLflow runs to make a logged model again, so that nothing of it is pickled. Not to be imported."""

import mlflow.models

from loupe.tracking.pyfunc import ImageModel

mlflow.models.set_model(ImageModel())
